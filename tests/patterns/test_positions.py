"""Positions are those of the document: packing, padding and dropped keys change nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from foveate import Packed, alibi, attend, attend_partial, document_numbers, key_padding, relative_table
from foveate.patterns import (
    Pattern,
    blocks,
    causal,
    full,
    global_tokens,
    mass_blocks,
    power_of_two,
    prefix,
    random_blocks,
    sinks,
    strided,
    topk_blocks,
    topk_keys,
    vertical_slash,
    window,
)

Mask = Callable[[Tensor, Tensor], Tensor]  # (H, N, D), (H, N, D) to (H, N, N), of one sequence alone

HEADS, DIM = 4, 16


def by_place(seen: Callable[[Tensor, Tensor], Tensor]) -> Mask:
    def mask(q: Tensor, k: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[1]).unsqueeze(1), torch.arange(q.shape[1])
        return (seen(i, j) & (i == i) & (j == j)).expand(len(q), -1, -1)

    return mask


def best_keys(count: int, reach: int | None = None) -> Mask:
    """For each query, one after the other: the keys with the greatest products, among those it may look at."""

    def mask(q: Tensor, k: Tensor) -> Tensor:
        seen = torch.zeros(len(q), q.shape[1], q.shape[1], dtype=torch.bool)
        for head in range(len(q)):
            for i in range(q.shape[1]):
                first = 0 if reach is None else max(i - reach, 0)
                order = sorted(range(first, i + 1), key=lambda j: -float(q[head, i] @ k[head, j]))
                seen[head, i, order[:count]] = True
        return seen

    return mask


def best_blocks(block: int, count: int) -> Mask:
    """MoBA: the own block up to the query, and the earlier ones whose mean key has the greatest product."""

    def mask(q: Tensor, k: Tensor) -> Tensor:
        seen = torch.zeros(len(q), q.shape[1], q.shape[1], dtype=torch.bool)
        for head in range(len(q)):
            for i in range(q.shape[1]):
                own = i // block
                score = [float(q[head, i] @ k[head, b * block : (b + 1) * block].mean(0)) for b in range(own)]
                for b in sorted(range(own), key=lambda b: -score[b])[: count - 1]:
                    seen[head, i, b * block : (b + 1) * block] = True
                seen[head, i, own * block : i + 1] = True
        return seen

    return mask


def lines(vertical: int, slash: int, last: int) -> Mask:
    """MInference: the keys and the distances that the last queries attend to most, distance 0 among them."""

    def mask(q: Tensor, k: Tensor) -> Tensor:
        n = q.shape[1]
        seen = torch.zeros(len(q), n, n, dtype=torch.bool)
        for head in range(len(q)):
            by_key, by_distance = torch.zeros(n, dtype=q.dtype), torch.zeros(n, dtype=q.dtype)
            for i in range(max(n - last, 0), n):
                weights = torch.softmax(q[head, i] @ k[head, : i + 1].T / DIM**0.5, 0)
                by_key[: i + 1] += weights
                by_distance[: i + 1] += weights.flip(0)
            by_distance[0] = float("inf")
            for j in by_key.topk(min(vertical, n)).indices.tolist():
                seen[head, :, j] = True
            for d in by_distance.topk(min(slash, n)).indices.tolist():
                seen[head].diagonal(-d).fill_(True)
        return seen.tril()

    return mask


STATIC: list[tuple[Pattern, Mask]] = [
    (full, by_place(lambda i, j: i >= 0)),
    (causal, by_place(lambda i, j: j <= i)),
    (window(4) & causal, by_place(lambda i, j: (j <= i) & (i - j <= 4))),
    (window(7) & causal | sinks(2), by_place(lambda i, j: (j <= i) & ((i - j <= 7) | (j < 2)))),
    (blocks(8) & causal, by_place(lambda i, j: (j <= i) & (i // 8 == j // 8))),
    (prefix(5) | causal, by_place(lambda i, j: (j <= i) | (j < 5))),
    (
        power_of_two(2) | window(1, 0),
        by_place(lambda i, j: (j <= i) & (i - j <= 1) | sum(i // 2 - j // 2 == 2**e for e in range(6)).bool()),
    ),
    (strided(3) & causal | blocks(5), by_place(lambda i, j: (j <= i) & ((i - j) % 3 == 0) | (i // 5 == j // 5))),
    (
        global_tokens([1, 6]) | window(1),
        by_place(lambda i, j: ((i - j).abs() <= 1) | (i == 1) | (i == 6) | (j == 1) | (j == 6)),
    ),
]
DYNAMIC: list[tuple[Pattern, Mask]] = [
    (topk_keys(3), best_keys(3)),
    (topk_keys(3) & window(6), best_keys(3, reach=6)),
    (topk_blocks(4, k=2), best_blocks(4, 2)),
    (vertical_slash(2, 3, last=5), lines(2, 3, 5)),
]
CASES = STATIC + DYNAMIC
IDS = [str(pattern) for pattern, _ in CASES]
every_pattern = pytest.mark.parametrize(("pattern", "mask"), CASES, ids=IDS)
every_impl = pytest.mark.parametrize("impl", ["reference", "tiles", "native"])


def heads(batch: int, length: int, impl: str) -> list[Tensor]:
    dtype = torch.float32 if impl == "native" else torch.float64
    q, k, v = torch.randn(3, batch, HEADS, length, DIM, dtype=dtype)
    return [x.clone().requires_grad_() for x in (q, k[:, ::2], v[:, ::2])]


def alone(mask: Mask, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, logits: Tensor | None = None) -> Tensor:
    """Softmax attention of the tokens in these slots of one batch entry, by dense weights: (H, n, D)."""
    q, k, v = (x[:, slots].double() for x in (q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)))
    scores = q @ k.mT / DIM**0.5
    scores = scores if logits is None else scores + logits
    return torch.softmax(scores.masked_fill(~mask(q.detach(), k.detach()), float("-inf")), -1) @ v


def assert_alone(pattern: Pattern, mask: Mask, impl: str, documents: list[tuple[int, Tensor]], length: int, **options):
    """Values and gradients of every document (batch entry, slots) are those it has alone."""
    batch = 1 + max(entry for entry, _ in documents)
    q, k, v = heads(batch, length, impl)
    out = attend(q, k, v, pattern, impl=impl, **options)
    grad = torch.randn_like(out)
    loss, expected = 0.0, 0.0
    tolerance = 2e-5 if impl == "native" else 1e-10
    for entry, slots in documents:
        truth = alone(mask, q[entry], k[entry], v[entry], slots)
        got = out[entry][:, slots]
        torch.testing.assert_close(got.double(), truth, atol=tolerance, rtol=tolerance)
        loss = loss + (got * grad[entry][:, slots]).sum()
        expected = expected + (truth * grad[entry][:, slots]).sum()
    actual, wanted = torch.autograd.grad(loss, (q, k, v)), torch.autograd.grad(expected, (q, k, v))
    for mine, theirs in zip(actual, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=10 * tolerance, rtol=10 * tolerance)


@every_impl
@every_pattern
def test_packed_documents(pattern: Pattern, mask: Mask, impl: str) -> None:
    lengths = [13, 0, 21, 1, 6]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    slots = [torch.arange(end - n, end) for n, end in zip(lengths, ends, strict=True) if n]
    documents = [(entry, each) for entry in (0, 1) for each in slots]
    assert_alone(pattern, mask, impl, documents, sum(lengths), layout=Packed(lengths))


@every_impl
@pytest.mark.parametrize("side", ["left", "right", "inner"])
@every_pattern
def test_padding(pattern: Pattern, mask: Mask, side: str, impl: str) -> None:
    length, place = 29, torch.arange(29)
    kept = torch.tensor([[29], [17], [17], [1]])  # two entries alike, which are run together
    inner = (torch.rand(3, length) < 0.6)[[0, 1, 1, 2]]
    real = {"left": place >= length - kept, "right": place < kept, "inner": inner}[side]
    documents = [(entry, torch.nonzero(row).squeeze(1)) for entry, row in enumerate(real)]
    assert_alone(pattern & key_padding(real), mask, impl, documents, length)


@every_impl
@every_pattern
def test_documents_by_number(pattern: Pattern, mask: Mask, impl: str) -> None:
    numbers = torch.tensor([[3] * 9 + [-1] * 2 + [0] * 12, [-1, 5, 5, 1, 5, 1, 1, 5] + [2] * 15])
    documents = []
    for entry, row in enumerate(numbers):
        documents += [(entry, torch.nonzero(row == n).squeeze(1)) for n in row.unique().tolist() if n >= 0]
    assert_alone(document_numbers(numbers) & pattern, mask, impl, documents, 23)


@every_impl
@pytest.mark.parametrize("biased", ["alibi", "table"])
@pytest.mark.parametrize(("pattern", "mask"), [CASES[1], CASES[3], CASES[-2]], ids=["causal", "sinks", "topk_blocks"])
def test_biases_by_distance(pattern: Pattern, mask: Mask, biased: str, impl: str) -> None:
    """Padding between tokens is not counted as distance."""
    real = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    q, k, v = heads(2, 12, impl)
    slopes, table = torch.rand(HEADS).to(q.dtype), torch.randn(HEADS, 7).to(q.dtype)
    bias = alibi(slopes) if biased == "alibi" else relative_table(table)
    out = attend(q, k, v, pattern & key_padding(real), bias=bias, impl=impl)
    for entry, row in enumerate(real):
        slots = torch.nonzero(row).squeeze(1)
        distance = torch.arange(len(slots)).unsqueeze(1) - torch.arange(len(slots))
        logits = table[:, distance.clamp(-3, 3) + 3] if biased == "table" else -slopes[:, None, None] * distance.abs()
        truth = alone(mask, q[entry], k[entry], v[entry], slots, logits.double())
        torch.testing.assert_close(out[entry][:, slots].double(), truth, atol=2e-5, rtol=2e-5)


@every_impl
@pytest.mark.parametrize("pattern", [p for p, _ in CASES if p.is_causal], ids=str)
def test_later_queries_of_padded_sequences(pattern: Pattern, impl: str) -> None:
    """A cache continued by some tokens gives what the whole gives, in a batch padded on the left."""
    q, k, v = heads(2, 31, impl)
    real = torch.arange(31) >= torch.tensor([[0], [9]])
    whole = attend(q, k, v, pattern & key_padding(real), impl=impl)
    for count in (1, 5):
        later = attend(q[:, :, -count:], k, v, pattern & key_padding(real), impl=impl)
        torch.testing.assert_close(later, whole[:, :, -count:], atol=1e-5, rtol=1e-5)


@every_impl
@pytest.mark.parametrize(
    "inside", [blocks(4) | sinks(3), topk_keys(3), topk_blocks(4, k=2), power_of_two(2), prefix(2)]
)
def test_dropped_keys(inside: Pattern, impl: str) -> None:
    """A cache that has dropped the keys beyond a window gives what the whole text gives."""
    q, k, v = heads(2, 31, impl)
    pattern = window(10) & causal & inside
    whole = attend(q, k, v, pattern, impl=impl)
    for count in (1, 3):
        first = 31 - 10 - count
        where = document_numbers(torch.zeros(1, 31 - first, dtype=torch.long), torch.arange(first, 31).unsqueeze(0))
        later = attend(q[:, :, -count:], k[:, :, first:], v[:, :, first:], pattern & where, impl=impl)
        torch.testing.assert_close(later, whole[:, :, -count:], atol=1e-5, rtol=1e-5)


def test_a_choice_among_dropped_keys_is_refused() -> None:
    q, k, v = heads(1, 9, "tiles")
    where = document_numbers(torch.zeros(9, dtype=torch.long), torch.arange(20, 29))
    with pytest.raises(ValueError, match="dropped the first 20"):
        attend(q, k, v, topk_keys(3) & where)


@every_impl
def test_a_choice_is_refused_where_the_window_beside_it_looks_back_at_dropped_keys(impl: str) -> None:
    q, k, v = heads(1, 9, impl)
    where = document_numbers(torch.zeros(9, dtype=torch.long), torch.arange(20, 29))
    with pytest.raises(ValueError, match="dropped the first 20"):
        attend(q[:, :, -2:], k, v, topk_keys(3) & window(8) & where, impl=impl)
    attend(q[:, :, -2:], k, v, topk_keys(3) & window(7) & where, impl=impl)


@every_impl
@pytest.mark.parametrize("inside", [blocks(8) & causal, sinks(7), topk_blocks(4, k=2) & window(3)], ids=str)
def test_told_positions_hold_beside_padding_and_packing(inside: Pattern, impl: str) -> None:
    """Positions that the caller names are counted anew only where a document is cut into several."""
    q, k, v = heads(2, 12, impl)
    numbers, told = torch.zeros(12, dtype=torch.long), torch.arange(12) + 5
    later = [x[:, :, -6:] for x in (q, k, v)] if inside.is_dynamic else [q, k, v]
    numbers, told = numbers[-later[0].shape[2] :], told[-later[0].shape[2] :]
    later[0] = later[0][:, :, -3:]
    pattern, length = document_numbers(numbers, told) & inside, len(told)
    alone = attend(*later, pattern, impl=impl)
    real = torch.ones(2, length, dtype=torch.bool)
    torch.testing.assert_close(attend(*later, pattern & key_padding(real), impl=impl), alone)
    torch.testing.assert_close(attend(*later, pattern, layout=Packed([length]), impl=impl), alone)
    torch.testing.assert_close(attend(*later, pattern & document_numbers(numbers), impl=impl), alone)


@every_impl
def test_told_positions_skip_what_padding_hides_and_start_again_in_parts(impl: str) -> None:
    q, k, v = heads(1, 9, impl)
    numbers, told = torch.zeros(9, dtype=torch.long), torch.arange(9) + 3
    real = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    out = attend(q, k, v, document_numbers(numbers, told) & blocks(4) & key_padding(real), impl=impl)
    group = (torch.arange(9) + 3) // 4
    mask = (group.unsqueeze(1) == group) & real
    want = alone(lambda q, k: mask, q[0], k[0], v[0], torch.arange(9))
    torch.testing.assert_close(out[0][:, real[0]].double(), want[:, real[0]], atol=2e-5, rtol=2e-5)
    cut = attend(q, k, v, document_numbers(numbers, told) & sinks(1), layout=Packed([4, 5]), impl=impl)
    first = torch.tensor([0] * 4 + [4] * 5)
    torch.testing.assert_close(cut, v.repeat_interleave(2, 1)[:, :, first])


@every_impl
@pytest.mark.parametrize("told", [[0, 1, 5, 6, 7, 9], [4, 5, 6, 1, 2, 3], [2, 1, 0, 3, 5, 4]], ids=str)
def test_told_positions_may_have_gaps_and_any_order(told: list[int], impl: str) -> None:
    """As in caches that keep some keys of a text, or write over the oldest."""
    q, k, v = heads(1, 6, impl)
    place, slopes = torch.tensor(told), torch.rand(HEADS).to(q.dtype)
    distance = place.unsqueeze(1) - place
    where = document_numbers(torch.zeros(6, dtype=torch.long), place)
    cases = [
        (causal, distance >= 0),
        (window(2), distance.abs() <= 2),
        (blocks(4) & causal, (place.unsqueeze(1) // 4 == place // 4) & (distance >= 0)),
        (sinks(2) | window(0, 1), (place < 2) & (distance >= 0) | (distance <= 0) & (distance >= -1)),
    ]
    for pattern, mask in cases:
        for bias, logits in ((None, None), (alibi(slopes), -slopes.double().view(-1, 1, 1) * distance.abs())):
            out = attend(q, k, v, pattern & where, bias=bias, impl="auto" if bias and impl == "native" else impl)
            want = alone(lambda q, k, mask=mask: mask, q[0], k[0], v[0], torch.arange(6), logits)  # type: ignore[misc]
            torch.testing.assert_close(out[0].double(), want, atol=2e-5, rtol=2e-5)
    with pytest.raises(ValueError, match="some are missing"):
        attend(q, k, v, topk_keys(2) & where, impl=impl)


def test_rows_that_are_padding_are_zero_and_have_no_weight() -> None:
    q, k, v = heads(1, 9, "tiles")
    real = torch.arange(9).unsqueeze(0) >= 4
    for impl in ("reference", "tiles"):
        partial = attend_partial(q, k, v, sinks(2) & key_padding(real), impl=impl)
        assert partial.lse is not None
        assert not partial.out[:, :, :4].any() and partial.lse[:, :, :4].isneginf().all()


def test_nested_padding_places_what_it_is_joined_with_and_nothing_else() -> None:
    """``(a & padding) | b``: b counts slots."""
    real = torch.arange(9).unsqueeze(0) >= 4
    seen = (sinks(1) & key_padding(real) | sinks(2)).mask(9)[0, 0]
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[4:, 4] = True
    expected[:, :2] = torch.ones(9, 2).tril()
    assert torch.equal(seen, expected)


def test_masks_changed_in_place_move_positions() -> None:
    real = torch.ones(1, 9, dtype=torch.bool)
    pattern = sinks(1) & key_padding(real)
    before = pattern.mask(9)
    real[0, :3] = False
    after = pattern.mask(9)[0, 0]
    assert before[0, 0, 8].tolist() == [True] + [False] * 8
    assert after[8].tolist() == [False] * 3 + [True] + [False] * 5


def test_selections_of_documents_are_their_masks() -> None:
    real = torch.rand(2, 150) < 0.8
    for pattern in (blocks(9) & causal | sinks(3), random_blocks(4, 0.3), mass_blocks(8, 0.7)):
        q = k = torch.randn(2, 3, 150, 8, dtype=torch.float64)
        placed = pattern & key_padding(real)
        dense = placed.select(q, k).to_dense()
        for entry, row in enumerate(real):
            slots = torch.nonzero(row).squeeze(1)
            own = pattern.select(q[entry : entry + 1, :, slots], k[entry : entry + 1, :, slots]).to_dense()[0]
            assert torch.equal(dense[entry][:, slots][:, :, slots], own)
            assert not dense[entry][:, :, ~row].any() and not dense[entry][:, ~row].any()


@pytest.mark.parametrize("pattern", [blocks(24) & causal | sinks(3), prefix(20) | window(9), power_of_two(4)], ids=str)
def test_selections_of_long_documents_are_their_masks_and_no_more(pattern: Pattern) -> None:
    """Where documents are longer than tiles, bounds say which tiles are needed and which are full."""
    place = torch.arange(400)
    numbers = torch.stack([torch.where(place < 130, -1, 0), torch.where(place < 70, 4, 1), torch.full((400,), 2)])
    q = k = torch.zeros(3, 1, 400, 1)
    chosen = (pattern & document_numbers(numbers)).select(q, k)
    dense = chosen.to_dense()
    for entry, row in enumerate(numbers):
        want = torch.zeros(400, 400, dtype=torch.bool)
        for number in row.unique()[row.unique() >= 0]:
            slots = torch.nonzero(row == number).squeeze(1)
            want[slots.unsqueeze(1), slots] = pattern.mask(len(slots))[0, 0]
        assert torch.equal(dense[entry, 0], want)
    padded = torch.nn.functional.pad(dense, (0, 48, 0, 48)).unflatten(2, (7, 64)).unflatten(4, (7, 64))
    assert chosen.num_tiles <= int(padded.any(5).any(3).sum())


@every_impl
@pytest.mark.parametrize("pattern", [blocks(4) & causal | sinks(2), topk_keys(2)], ids=str)
def test_a_padded_pattern_first_used_without_gradients_trains_later(pattern: Pattern, impl: str) -> None:
    q, k, v = heads(1, 11, impl)
    padded = pattern & key_padding(torch.tensor([[0, 1, 1, 0, 1, 0, 1, 1, 1, 1, 0]], dtype=torch.bool))
    with torch.inference_mode():
        first = attend(q, k, v, padded, impl=impl)
    out = attend(q, k, v, padded, impl=impl)
    torch.testing.assert_close(out, first.clone())
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v)))
