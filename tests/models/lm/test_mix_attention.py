"""MixAttention written out with dense masks and repeated keys, its caches counted, decoding and prompts."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.decoders import gated, in_heads, louder, rms, turned
from tests.support.formulas import follows
from torch import Tensor, nn

from foveate.models.lm import mix_attention
from foveate.models.lm.decoder import LayerKind

SIZES = {"dim": 12, "heads": 4, "kv_heads": 2, "hidden": 20}
PUBLISHED = [
    (None, None),
    *[(4, r) for r in (None, 1, None, 3, 3)],
    (None, 0),
    *[(4, r) for r in (None, 7, None, 9, 9)],
    (None, 0),
]
# windows of readers that are wider than, as wide as and narrower than their owner's, and a reader of a reader
MIXED = [(3, None), (7, 0), (None, None), (2, 2), (5, 1), (None, 2)]


def kinds_of(plan: list[tuple[int | None, int | None]]) -> list[LayerKind]:
    return [LayerKind(window, 500.0, None, reuses) for window, reuses in plan]


def formula(model: nn.Module, tokens: Tensor, plan: list[tuple[int | None, int | None]], base: float) -> Tensor:
    x = model.embed.weight[tokens]
    apart = torch.arange(tokens.shape[1]).unsqueeze(1) - torch.arange(tokens.shape[1])
    keys: list[tuple[Tensor, Tensor]] = []
    for layer, (window, reuses) in zip(model.layers, plan, strict=True):
        y, mixer = rms(x, layer.norm.weight), layer.mixer
        q = turned(in_heads(y, mixer.to_q.weight, 4), base)
        if reuses is None:
            k, v = turned(in_heads(y, mixer.to_k.weight, 2, 2), base), in_heads(y, mixer.to_v.weight, 2, 2)
        else:
            k, v = keys[reuses]
        keys.append((k, v))
        logits = (q @ k.mT / math.sqrt(3)).masked_fill((apart < 0) | (apart >= (window or 1000)), -math.inf)
        x = x + (logits.softmax(-1) @ v).transpose(1, 2).flatten(2) @ mixer.to_out.weight.T
        x = x + gated(layer.channels, rms(x, layer.channels_norm.weight))
    return rms(x, model.norm.weight) @ model.head.weight.T


@pytest.mark.paper("MixAttention", "definition")
def test_windows_and_shared_keys_in_the_published_order() -> None:
    model = louder(mix_attention(11, periods=2, window=4, **SIZES).double())
    tokens = torch.randint(11, (2, 15))
    follows(model, lambda: model(tokens), lambda: formula(model, tokens, PUBLISHED, 10_000.0))


@pytest.mark.paper("MixAttention", "definition")
@pytest.mark.paper("MixAttention", "works_when")
def test_each_layer_says_what_it_sees_and_whose_keys_it_reads() -> None:
    model = louder(mix_attention(11, kinds=kinds_of(MIXED), **SIZES).double())
    tokens = torch.randint(11, (2, 13))
    follows(model, lambda: model(tokens), lambda: formula(model, tokens, MIXED, 500.0))


@pytest.mark.paper("MixAttention", "works_when")
@pytest.mark.parametrize("cuts", [[1] * 100, [3, 47, 1, 49], [70] + [1] * 30], ids=["steps", "parts", "prompt"])
def test_decoding_is_the_whole_and_caches_are_those_of_distinct_keys(cuts: list[int]) -> None:
    """One cache for each layer that has keys: as long as its widest reader needs, whatever its own layer sees."""
    model = louder(mix_attention(11, kinds=kinds_of(MIXED), **SIZES).double())
    tokens = torch.randint(11, (2, 100))
    with torch.no_grad():
        expected, state, outs = formula(model, tokens, MIXED, 500.0), model.init_state(2), []
        assert len(state) == 2  # of six layers
        for part in tokens.split(cuts, dim=1):
            out, state = model.prefill(part, state) if part.shape[1] > 1 else model.decode(part, state)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-8, atol=1e-8)
    near, far = state
    assert far.k.shape[2] == far.v.shape[2] == 100
    assert 6 <= near.k.shape[2] <= 7 + 32
    held = [cache.k.untyped_storage().nbytes() // (cache.k[:, :, 0].numel() * 8) for cache in state]
    assert held[0] <= 7 + 32


@pytest.mark.paper("MixAttention", "works_when")
def test_memory_of_the_published_order_is_that_of_one_growing_cache() -> None:
    """13 layers, of which one keeps all of 400 tokens, four keep windows and eight keep nothing."""
    model, plain = (
        mix_attention(11, periods=2, window=4, kinds=kinds, **SIZES) for kinds in (None, [LayerKind()] * 13)
    )
    tokens = torch.randint(11, (1, 400))
    with torch.no_grad():
        state, every = (one.prefill(tokens, one.init_state(1, 400)).state for one in (model, plain))
    assert (len(state), len(every)) == (5, 13)
    row = 2 * 2 * 3 * 4  # bytes of keys and values of a token
    assert sum(cache.nbytes for cache in every) == 13 * 400 * row
    assert sum(cache.nbytes for cache in state) <= (400 + 4 * (4 + 32)) * row
    assert sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in model.parameters()) == 8 * 2 * 12 * 6


def test_what_cannot_be_reused_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 1 reuses the keys of an earlier one"):
        mix_attention(11, kinds=[LayerKind(), LayerKind(reuses=1)], **SIZES)
    with pytest.raises(ValueError, match="give it the same rotary"):
        mix_attention(11, kinds=[LayerKind(), LayerKind(rotary=None, reuses=0)], **SIZES)
    with pytest.raises(ValueError, match="at least one layer"):
        mix_attention(11, kinds=[], **SIZES)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        mix_attention(11, periods=0, **SIZES)
