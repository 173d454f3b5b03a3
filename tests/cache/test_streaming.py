"""The streaming memory against each query's sinks and window written out, at places counted in the cache."""

from __future__ import annotations

import pytest
import torch
from tests.support.llama_by_hand import turned
from torch import Tensor

from foveate.cache.memory import Look
from foveate.cache.slots import FREE
from foveate.cache.streaming import StreamingMemory

SINKS, WINDOW, LENGTH = 3, 7, 41
CUTS = [[1] * LENGTH, [29] + [1] * 12, [4, 1, 15, 2, 19], [10, 3, 1, 1, 5, 1, 1, 19], [LENGTH]]


def by_hand(q: Tensor, k: Tensor, v: Tensor, first: int, slopes: Tensor | None, rotary: bool, in_cache: bool) -> Tensor:
    """(H, N, D) of one text whose first tokens are padding: every query with the keys its cache holds, in a loop."""
    out = torch.zeros_like(q)
    for i in range(first, q.shape[1]):
        kept = [j for j in range(first, i + 1) if j < first + SINKS or j > i - WINDOW]
        places = torch.arange(len(kept)) if in_cache else torch.tensor(kept) - first
        keys, query = k[:, kept], q[:, i]
        if rotary:
            keys, query = turned(keys, places), turned(query, places[-1])
        scores = (keys @ query.unsqueeze(-1)).squeeze(-1) * 0.3
        if slopes is not None:
            scores = scores - slopes[:, None] * (places[-1] - places)
        out[:, i] = (scores.softmax(-1).unsqueeze(-1) * v[:, kept]).sum(1)
    return out


def run(
    cuts: list[int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: list[int],
    slopes: Tensor | None,
    rotary: bool,
    in_cache: bool,
) -> tuple[Tensor, StreamingMemory]:
    """The memory over cuts of a batch; keys come turned to their places in the text, as models hand them over."""
    memory = StreamingMemory(SINKS, WINDOW, in_cache)
    place = torch.arange(LENGTH) - torch.tensor(first)[:, None]  # (B, N)
    if rotary:
        q, k = turned(q, place[:, None]), turned(k, place[:, None])
    out, at = [], 0
    for count in cuts:
        part = slice(at, at + count)
        at += count
        options = {"scale": 0.3, "bias": None, "weights": "softmax", "softcap": None}
        if slopes is not None:
            options["bias"] = slopes[:, None, None] * place[:, None, None, :at].clamp_min(0)
        position = torch.where(place < 0, FREE, place)[:, part]
        steps = None if slopes is None else slopes.unsqueeze(0)
        look = Look(
            position, options, turn=(lambda x, by: turned(x, by.unsqueeze(1))) if rotary else None, slopes=steps
        )
        out.append(memory.attend(q[:, :, part], k[:, :, part], v[:, :, part], look))
    return torch.cat(out, 2), memory


@pytest.mark.paper("StreamingLLM", "definition")
@pytest.mark.parametrize("in_cache", [True, False], ids=["in_cache", "in_text"])
@pytest.mark.parametrize("kind", ["rotary", "alibi", "neither"])
@pytest.mark.parametrize("cuts", CUTS, ids=["one by one", "prompt", "pieces", "mixed", "whole"])
def test_each_query_meets_its_sinks_and_window_at_places_in_the_cache(
    cuts: list[int], kind: str, in_cache: bool
) -> None:
    q, k, v = (torch.randn(2, heads, LENGTH, 8, dtype=torch.float64) for heads in (4, 2, 2))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64) if kind == "alibi" else None
    first = [0, 5]
    with torch.no_grad():
        out, _ = run(cuts, q, k, v, first, slopes, kind == "rotary", in_cache)
    for entry in range(2):
        keys, values = (x[entry].repeat_interleave(2, 0) for x in (k, v))
        want = by_hand(q[entry], keys, values, first[entry], slopes, kind == "rotary", in_cache)
        torch.testing.assert_close(out[entry, :, first[entry] :], want[:, first[entry] :])


@pytest.mark.paper("StreamingLLM", "works_when")
def test_memory_stays_constant() -> None:
    memory, taken = StreamingMemory(SINKS, WINDOW), []
    with torch.no_grad():
        for at in range(500):
            new = torch.randn(1, 2, 1, 8)
            memory.attend(new, new, new, Look(torch.tensor([[at]]), {}, padded=False))
            taken.append(memory.nbytes)
            assert memory.kept.ge(0).sum(2).max() <= SINKS + WINDOW - 1
    assert set(taken[SINKS + WINDOW :]) == {2 * (SINKS + WINDOW) * (8 + 8 + 2) * 4}  # float32, and int64 positions
    assert sorted(memory.kept[0, 0].tolist()) == [FREE, 0, 1, 2, *range(500 - WINDOW + 1, 500)]


def test_gradients_flow_through_a_memory() -> None:
    q, k, v = (torch.randn(2, heads, LENGTH, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    cotangent = torch.randn(2, 4, LENGTH, 8, dtype=torch.float64)
    out, _ = run(CUTS[1], q, k, v, [0, 0], None, True, True)
    got = torch.autograd.grad((out * cotangent).sum(), (q, k, v))
    want = torch.stack(
        [
            by_hand(q[b], k[b].repeat_interleave(2, 0), v[b].repeat_interleave(2, 0), 0, None, True, True)
            for b in range(2)
        ]
    )
    for one, other in zip(got, torch.autograd.grad((want * cotangent).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(one, other)


def test_tokens_taken_back_leave_nothing_behind() -> None:
    q, k, v = (torch.randn(1, 2, LENGTH, 8, dtype=torch.float64) for _ in range(3))
    memory = StreamingMemory(SINKS, WINDOW)
    memory.record_past = True

    def step(part: slice) -> Tensor:
        position = torch.arange(LENGTH)[None, part]
        look = Look(position, {"scale": 0.3}, turn=lambda x, by: turned(x, by.unsqueeze(1)), padded=False)
        turned_q, turned_k = (turned(x[:, :, part], position) for x in (q, k))
        return memory.attend(turned_q, turned_k, v[:, :, part], look)

    out, at = [], 0
    with torch.no_grad():
        for tried, right in ((15, 15), (6, 2), (5, 5), (1, 1), (7, 0), (8, 8), (4, 1), (9, 9)):
            out.append(step(slice(at, at + tried))[:, :, :right])
            memory.crop(tried - right)
            at += right
    want = by_hand(q[0], k[0], v[0], 0, None, True, True)[:, :at]
    torch.testing.assert_close(torch.cat(out, 2)[0], want)
    with pytest.raises(ValueError, match="record the past"):
        memory.crop(3)


def test_a_token_is_not_taken_back_when_an_older_one_has_been_chosen_to_make_room() -> None:
    """With one token more than is kept, the next one takes a slot that is chosen already."""

    def filled(count: int) -> StreamingMemory:
        memory = StreamingMemory(2, 4)  # keeps 5
        for at in range(count):
            new = torch.randn(1, 1, 1, 8)
            memory.attend(new, new, new, Look(torch.tensor([[at]]), {}, padded=False))
        return memory

    with torch.no_grad():
        whole, full = filled(5), filled(6)
    whole.crop(1)
    assert whole.kept[0, 0].tolist() == [0, 1, 2, 3] and whole.seen == 4
    with pytest.raises(ValueError, match="record the past"):
        full.crop(1)
    assert sorted(full.kept[0, 0].tolist()) == [FREE, 0, 1, 3, 4, 5] and full.seen == 6
