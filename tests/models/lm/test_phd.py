"""PHD-Transformer: every copy of every token in one dense table, masked pair by pair, and what its caches keep."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.decoders import gated, in_heads, louder, rms, turned
from tests.support.formulas import follows
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from foveate.models.lm import phd_transformer

SIZES = {"dim": 12, "depth": 2, "heads": 4, "kv_heads": 2, "hidden": 20}
# (copies, window, chunk): CSWA with one and with two hidden tokens a token, SWA, a window shorter than a token's own
# copies, plain PHD, and no copies at all
PLANS = [(2, 3, 5), (3, 4, 4), (3, 5, None), (4, 1, None), (3, 0, None), (2, 0, 4), (1, 3, 4)]


def sees(query: tuple[int, int], key: tuple[int, int], copies: int, window: int, chunk: int | None) -> bool:
    """Whether copy j of token n sees copy i of token m: equation 2, and the window of hidden tokens in chunks."""
    (n, j), (m, i) = query, key
    if i == 1 and m < n:
        return True
    if i <= j and m == n:
        return True
    if i == 1 or j == 1 or (chunk is not None and m // chunk != n // chunk):
        return False
    back = (n * (copies - 1) + j) - (m * (copies - 1) + i)
    return 0 <= back <= window


def formula(model: nn.Module, tokens: Tensor, copies: int, window: int, chunk: int | None) -> Tensor:
    places = [(n, j) for n in range(tokens.shape[1]) for j in range(1, copies + 1)]
    mask = torch.tensor([[sees(query, key, copies, window, chunk) for key in places] for query in places])
    at = torch.tensor([n for n, _ in places])
    x = model.embed.weight[tokens[:, at]]
    for layer in model.layers:
        y, mixer = rms(x, layer.norm.weight), layer.mixer
        q = turned(in_heads(y, mixer.to_q.weight, 4), 500_000.0, at)
        k = turned(in_heads(y, mixer.to_k.weight, 2, 2), 500_000.0, at)
        v = in_heads(y, mixer.to_v.weight, 2, 2)
        weights = (q @ k.mT / math.sqrt(3)).masked_fill(~mask, -math.inf).softmax(-1)
        x = x + (weights @ v).transpose(1, 2).flatten(2) @ mixer.to_out.weight.T
        x = x + gated(layer.channels, rms(x, layer.channels_norm.weight))
    return rms(x[:, copies - 1 :: copies], model.norm.weight) @ model.head.weight.T


def built(copies: int, window: int, chunk: int | None) -> nn.Module:
    return louder(phd_transformer(11, copies=copies, window=window, chunk=chunk, **SIZES).double())


@pytest.mark.paper("PHD-Transformer", "definition")
@pytest.mark.paper("PHD-Transformer", "works_when")
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_one_pass_is_attention_under_the_papers_mask(plan: tuple[int, int, int | None]) -> None:
    """Gradients too: training is this one pass."""
    model, tokens = built(*plan), torch.randint(11, (2, 11))
    follows(model, lambda: model(tokens), lambda: formula(model, tokens, *plan))


@pytest.mark.paper("PHD-Transformer", "works_when")
@pytest.mark.parametrize("plan", [(3, 4, 4), (3, 5, None), (3, 0, None)], ids=["CSWA", "SWA", "PHD"])
@pytest.mark.parametrize("cuts", [[1] * 44, [7, 16, 1, 20]], ids=["steps", "parts"])
def test_decoding_keeps_original_keys_and_the_window(plan: tuple[int, int, int | None], cuts: list[int]) -> None:
    model, tokens = built(*plan), torch.randint(11, (2, 44))
    with torch.no_grad():
        expected, state, outs = formula(model, tokens, *plan), model.init_state(2), []
        for part in tokens.split(cuts, dim=1):
            out, state = model.prefill(part, state) if part.shape[1] > 1 else model.decode(part, state)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-8, atol=1e-8)
    for original, hidden in state:
        assert original.k.shape[2] == 44
        held = hidden.k.untyped_storage().nbytes() // (hidden.k[:, :, 0].numel() * 8)
        assert max(hidden.k.shape[2], held) <= max(plan[1], 2) + 2 + 32 < 2 * 44


@pytest.mark.paper("PHD-Transformer", "works_when")
@pytest.mark.parametrize(
    ("plan", "computed"),
    [((3, 4, 4), 3), ((4, 4, 4), 3), ((3, 0, None), 1), ((3, 5, None), 23)],
    ids=["CSWA", "CSWA of four", "PHD", "SWA"],
)
def test_a_prompt_needs_hidden_tokens_in_its_last_chunk_alone(
    plan: tuple[int, int, int | None], computed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last token's logits, and those decoded after it, with copies made of the last chunk's tokens only."""
    model, tokens, counts = built(*plan), torch.randint(11, (2, 23 + 9)), []
    inner = model.layers[0].mixer.with_copies
    monkeypatch.setattr(
        model.layers[0].mixer, "with_copies", lambda x, y, state: (counts.append(y.shape[1]), inner(x, y, state))[1]
    )
    with torch.no_grad():
        expected = formula(model, tokens, *plan)
        out, state = model.read(tokens[:, :23], model.init_state(2))
        outs = [out]
        assert counts == [computed]
        for t in range(23, 30):
            out, state = model.decode(tokens[:, t : t + 1], state)
            outs.append(out)
        outs.append(model.read(tokens[:, 30:], state).out)  # a second part, in a chunk that has begun
    assert torch.cat(outs, 1).shape[1] == 9
    torch.testing.assert_close(torch.cat(outs[:-1], 1), expected[:, 22:30], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(outs[-1], expected[:, -1:], rtol=1e-8, atol=1e-8)


@pytest.mark.paper("PHD-Transformer", "works_when")
def test_it_learns_from_one_pass_over_all_copies() -> None:
    """Each next token is the sum of the two before it, modulo 7."""
    model = phd_transformer(7, copies=3, window=4, chunk=8, **{**SIZES, "dim": 32, "hidden": 48})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        tokens = torch.randint(7, (8, 2))
        for _ in range(14):
            tokens = torch.cat([tokens, (tokens[:, -1:] + tokens[:, -2:-1]) % 7], 1)
        loss = cross_entropy(model(tokens[:, :-1])[:, 1:].flatten(0, 1), tokens[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.9 * losses[0]


def test_refusals_in_words() -> None:
    with pytest.raises(ValueError, match="copies and chunk are at least 1"):
        phd_transformer(11, copies=0, **SIZES)
    with pytest.raises(ValueError, match="copies and chunk are at least 1"):
        phd_transformer(11, chunk=0, **SIZES)
    model = phd_transformer(11, **SIZES)
    with pytest.raises(ValueError, match="at least one token"):
        model.read(torch.empty(1, 0, dtype=torch.long), model.init_state(1))
