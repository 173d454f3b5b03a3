"""PLT: loops one after the other over dense tables, against one pass and against all loops side by side."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.decoders import gated, in_heads, louder, rms, turned
from tests.support.formulas import follows
from torch import Tensor, nn

from foveate.models.lm import plt

SIZES = {"dim": 12, "depth": 2, "heads": 4, "kv_heads": 2, "hidden": 20}
BASE = 500_000.0


def dense(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    apart = torch.arange(q.shape[2]).unsqueeze(1) - torch.arange(q.shape[2])
    logits = (q @ k.mT / math.sqrt(q.shape[3])).masked_fill((apart < 0) | (apart >= window), -math.inf)
    return logits.softmax(-1) @ v


def formula(model: nn.Module, tokens: Tensor, loops: int, window: int) -> Tensor:
    e = model.embed.weight[tokens]
    ended, shared = torch.zeros_like(e), []
    for loop in range(loops):
        x = e if loop == 0 else e + torch.cat([torch.zeros_like(e[:, :1]), ended[:, :-1]], 1)
        for number, layer in enumerate(model.layers):
            y, mixer = rms(x, layer.norm.weight), layer.mixer
            q = turned(in_heads(y, mixer.to_q.weight, 4), BASE)
            k, v = turned(in_heads(y, mixer.to_k.weight, 2, 2), BASE), in_heads(y, mixer.to_v.weight, 2, 2)
            if loop == 0:
                shared.append((k, v))
                out = dense(q, k, v, 10_000)
            else:
                gate = 1 / (1 + torch.exp(-(y @ mixer.to_gate.weight.T + mixer.to_gate.bias)))
                gate = gate.transpose(1, 2).unsqueeze(3)
                out = gate * dense(q, k, v, window) + (1 - gate) * dense(q, *shared[number], 10_000)
            x = x + out.transpose(1, 2).flatten(2) @ mixer.to_out.weight.T
            x = x + gated(layer.channels, rms(x, layer.channels_norm.weight))
        ended = x
    return rms(ended, model.norm.weight) @ model.head.weight.T


def built(loops: int, window: int) -> nn.Module:
    model = louder(plt(11, loops=loops, window=window, **SIZES).double())
    with torch.no_grad():
        for layer in model.layers:
            layer.mixer.to_gate.weight.normal_()
            layer.mixer.to_gate.bias.normal_()
    return model


@pytest.mark.paper("PLT", "definition")
@pytest.mark.paper("PLT", "works_when")
@pytest.mark.parametrize(("loops", "window"), [(1, 3), (2, 3), (3, 1), (4, 5)])
def test_loops_a_token_behind_one_another_and_gates_between_both_attentions(loops: int, window: int) -> None:
    model, tokens = built(loops, window), torch.randint(11, (2, 13))
    follows(model, lambda: model(tokens), lambda: formula(model, tokens, loops, window))


@pytest.mark.paper("PLT", "works_when")
@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize("prompt", [0, 1, 31])
def test_loops_side_by_side_token_by_token_give_the_same_logits(loops: int, prompt: int) -> None:
    """While decoding no loop waits for another: each begins with what the one before it made of the last token."""
    model, tokens = built(loops, 4), torch.randint(11, (2, 61))
    with torch.no_grad():
        expected, state = formula(model, tokens, loops, 4), model.init_state(2)
        out, state = model.prefill(tokens[:, :prompt], state)
        outs = [out]
        for t in range(prompt, 61):
            out, state = model.decode(tokens[:, t : t + 1], state)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-8, atol=1e-8)
    assert [cache.k.shape[2] for cache in state.shared] == [61, 61]
    assert len(state.own) == loops - 1
    assert all(3 <= cache.k.shape[2] <= 4 + 32 for caches in state.own for cache in caches)


@pytest.mark.paper("PLT", "works_when")
def test_a_prompt_in_parts_goes_on_where_the_last_part_ended() -> None:
    model, tokens = built(3, 4), torch.randint(11, (2, 61))
    with torch.no_grad():
        expected, state, outs = formula(model, tokens, 3, 4), model.init_state(2), []
        for part in tokens.split([5, 40, 1, 15], dim=1):
            out, state = model.prefill(part, state)
            outs.append(out)
            assert all(cache.k.shape[2] <= 4 + 32 for caches in state.own for cache in caches)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.paper("PLT", "works_when")
def test_a_decoded_token_goes_through_each_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All loops as rows of the same products; a prompt of the same token goes through once for each loop."""
    model, calls = built(3, 4), []
    inner = model.layers[1].channels.forward
    monkeypatch.setattr(model.layers[1].channels, "forward", lambda x: (calls.append(tuple(x.shape)), inner(x))[1])
    with torch.no_grad():
        _, state = model.prefill(torch.randint(11, (2, 5)), model.init_state(2))
        assert calls == [(2, 5, 12)] * 3
        calls.clear()
        model.decode(torch.randint(11, (2, 1)), state)
    assert calls == [(2, 3, 12)]


@pytest.mark.paper("PLT", "definition")
def test_gates_begin_at_one_half() -> None:
    model = plt(11, loops=2, window=3, **SIZES)
    for layer in model.layers:
        assert not layer.mixer.to_gate.weight.any()
        assert not layer.mixer.to_gate.bias.any()


def test_refusals_in_words() -> None:
    with pytest.raises(ValueError, match="at least once; got 0"):
        plt(11, loops=0, **SIZES)
    with pytest.raises(ValueError, match="at least the query's own key"):
        plt(11, window=0, **SIZES)
