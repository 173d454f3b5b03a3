"""LongHeads inside models: chunks chosen and moved by loops over heads and queries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.support.llama_by_hand import exact, logits, turned
from tests.support.small_models import small_model
from torch import Tensor

from foveate.catalogue import tiers

pytest.importorskip("transformers")
CHUNK, COUNT, LENGTH = 5, 4, 58


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def softmax_over(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * k.shape[-1] ** -0.5).softmax(-1) @ v


def heads_out(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    """The definition, from heads that are not turned: chunks of 5, of which each head of a query sees 4."""
    out, within = exact(q, k, v, layer), torch.arange(CHUNK)
    for h in range(q.shape[0]):
        stands = []
        for c in range(LENGTH // CHUNK):
            part = slice(c * CHUNK, (c + 1) * CHUNK)
            here_q, here_k = turned(q[h, part], within), turned(k[h, part], within)
            mean = softmax_over(here_q, here_k, v[h, part]).mean(0, keepdim=True)
            stands.append(softmax_over(mean, here_k, here_k)[0])
        for i in range(CHUNK * COUNT, LENGTH):
            own = i // CHUNK
            others = sorted(range(1, own - 1), key=lambda c: -float(q[h, i] @ stands[c]))[: COUNT - 3]
            chunks = [0, *sorted(others), own - 1, own]
            tokens = [j for c in chunks for j in range(c * CHUNK, (c + 1) * CHUNK) if j <= i]
            places = [rank * CHUNK + offset for rank in range(COUNT) for offset in range(CHUNK)][: len(tokens)]
            keys = turned(k[h, tokens], torch.tensor(places))
            out[h, i] = softmax_over(turned(q[h, i], torch.tensor(places[-1]))[None], keys, v[h, tokens])[0]
    return out


@pytest.mark.paper("LongHeads", "definition")
@pytest.mark.paper("LongHeads", "works_when")
@pytest.mark.parametrize("cuts", [[LENGTH], [31] + [1] * 27, [9, 20, 1, 23, 5]])
def test_prompts_and_decoding_choose_and_move_chunks_as_the_formula_does(cuts: list[int]) -> None:
    model, tokens = small_model("llama"), torch.randint(1, 50, (LENGTH,))
    want = logits(model, tokens, heads_out)
    change = tiers.row("longheads").make(chunk=CHUNK, count=COUNT).install(model)
    try:
        cache, got = None, []
        for part in tokens.split(cuts):
            out = model(part[None], past_key_values=cache)
            cache = out.past_key_values
            got.append(out.logits[0])
    finally:
        change.undo()
    torch.testing.assert_close(torch.cat(got), want, atol=1e-5, rtol=1e-5)  # transformers' angles are float32


@pytest.mark.paper("LongHeads", "works_when")
def test_while_all_chunks_fit_it_is_full_attention() -> None:
    model, tokens = small_model("llama"), torch.randint(1, 50, (2, CHUNK * COUNT + 1))
    want = model(tokens).logits
    change = tiers.row("longheads").make(chunk=CHUNK, count=COUNT).install(model)
    try:
        got = model(tokens).logits
    finally:
        change.undo()
    torch.testing.assert_close(got[:, :-1], want[:, :-1])
    assert (got[:, -1] - want[:, -1]).abs().max() > 1e-3


@pytest.mark.paper("LongHeads", "works_when")
def test_no_head_meets_a_distance_beyond_the_trained_length() -> None:
    """Every key and query is turned, before they meet, to a place below chunk * count."""
    from foveate.cache.longheads import LongHeadsMemory
    from foveate.cache.memory import Look

    places: list[Tensor] = []

    def turn(x: Tensor, by: Tensor) -> Tensor:
        """The last channel of these keys and queries is their place."""
        moved = x + torch.nn.functional.pad(by[:, None, :, None].to(x.dtype), (x.shape[3] - 1, 0))
        places.append(moved[..., -1])
        return moved

    memory = LongHeadsMemory(CHUNK, COUNT)
    at = torch.arange(300)
    q, k = (torch.cat([torch.randn(1, h, 300, 4), at[:, None].expand(1, h, 300, 1)], 3) for h in (4, 2))
    with torch.no_grad():
        memory.attend(q, k, torch.randn(1, 2, 300, 5), Look(at[None], {"scale": 0.0}, turn=turn, padded=False))
        places.clear()
        for step in range(300, 320):
            one = torch.randn(1, 4, 1, 5)
            one[..., -1] = step
            memory.attend(one, one[:, :2], one[:, :2], Look(torch.tensor([[step]]), {}, turn=turn, padded=False))
    keys = torch.stack([p for p in places if p.shape[-1] == CHUNK * COUNT])
    assert keys.shape[:2] == (20, 4)
    assert torch.equal(keys[:, :, 0], torch.arange(CHUNK * COUNT).expand(20, 4, -1).float())


@pytest.mark.paper("LongHeads", "works_when")
def test_measured_chosen_chunks_tell_more_than_as_many_recent_tokens() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "kv_reach.json"
    losses = {name: sum(each) / len(each) for name, each in json.loads(path.read_text())["losses"].items()}
    assert losses["longheads, 256"] < losses["latest, 256"]


def test_what_it_cannot_do_it_refuses() -> None:
    with pytest.raises(ValueError, match="3 or more"):
        tiers.row("longheads").make(count=2)
    model = small_model("gpt2")
    change = tiers.row("longheads").make(chunk=4, count=3).install(model)
    try:
        with pytest.raises(NotImplementedError, match="rotary"):
            model(torch.randint(1, 50, (1, 20)))
    finally:
        change.undo()
