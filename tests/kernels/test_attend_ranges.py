"""attend_ranges against dense weights in float64."""

from __future__ import annotations

import random
import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tests.support.native_checks import needs_native
from torch import Tensor, inf, nan
from torch.testing import assert_close

from foveate import explain, softmax
from foveate.attention.key_ranges import KeyRanges
from foveate.attention.ranges import ATTEND_RANGES, attend_ranges, attend_scored
from foveate.options import forced_impl

HEADS = ((1, 1, 1), (8, 8, 8), (8, 2, 2), (6, 2, 3), (12, 4, 6), (8, 8, 1), (8, 1, 8))
CLOSE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def drawn(heads: int, num_keys: int) -> list[tuple[tuple[int, int], ...]]:
    """Ranges for each head, some of them empty."""
    rows = []
    for _ in range(heads):
        edges = sorted(random.sample(range(num_keys + 1), 2 * random.randint(0, 5)))
        rows.append(tuple(zip(edges[::2], edges[1::2], strict=True)))
    return rows


def marked(rows: list[tuple[tuple[int, int], ...]], heads: int, num_keys: int) -> Tensor:
    mask = torch.zeros(1, heads, 1, num_keys, dtype=torch.bool)
    for head in range(heads):
        for first, end in rows[head * len(rows) // heads]:
            mask[0, head, 0, first:end] = True
    return mask


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, kind: str, scale: float) -> Tensor:
    q, k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (q, k, v))
    logits = q @ k.mT * scale + (0 if bias is None else bias.double())
    if kind == "softmax":
        return logits.masked_fill(~mask, -inf).softmax(-1).nan_to_num(0) @ v
    weights = torch.sigmoid(logits) if kind == "sigmoid" else torch.relu(logits)
    return weights.masked_fill(~mask, 0) @ v


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_ranges_are_all_that_is_seen(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    query_heads, key_heads, value_heads = heads
    for rows in {1, key_heads, query_heads}:
        queries, num_keys, dim = random.choice((1, 1, 3)), random.choice((70, 333)), random.choice((7, 32))
        sizes = ((query_heads, queries, dim), (key_heads, num_keys, dim), (value_heads, num_keys, 19))
        q, k, v = (torch.randn(2, *size).to(dtype) for size in sizes)
        bias = torch.randn(random.choice((1, 2)), random.choice((1, query_heads)), 1, num_keys)
        ranges, kind = drawn(rows, num_keys), random.choice(("softmax", "softmax", "sigmoid", "relu"))
        for added in (None, bias):
            added = added if added is None or dtype != torch.float64 else added.double()
            out = attend_ranges(q, k, v, KeyRanges.of(ranges), bias=added, weights=kind, scale=0.2)
            mask = marked(ranges, query_heads, num_keys)
            expected, sizes = (dense(q, k, x, mask, added, kind, 0.2) for x in (v, v.abs()))
            assert bool(((out.double() - expected).abs() <= CLOSE[dtype] * (1 + sizes)).all()), kind


def test_ranges_of_tensors_tell_batch_entries_apart() -> None:
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 90, 8), torch.randn(2, 4, 90, 8)
    rows = [drawn(4, 90) for _ in range(2)]
    flat = [ranges for entry in rows for ranges in entry]
    starts = torch.tensor([0, *(len(ranges) for ranges in flat)]).cumsum(0)
    pairs = torch.tensor([pair for ranges in flat for pair in ranges], dtype=torch.long)
    seen = KeyRanges(2, 4, starts, pairs)
    mask = torch.cat([marked(entry, 4, 90) for entry in rows])
    assert (seen.mask(90, q.device) == mask).all()
    expected = dense(q, k, v, mask, None, "softmax", 8**-0.5)
    assert_close(attend_ranges(q, k, v, seen).double(), expected, rtol=CLOSE[q.dtype], atol=CLOSE[q.dtype])


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_scored_attention_gives_the_logits_of_its_weights(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    query_heads, key_heads, value_heads = heads
    for queries, num_keys in ((1, 333), (3, 70), (1, 0)):
        sizes = ((query_heads, queries, 7), (key_heads, num_keys, 7), (value_heads, num_keys, 19))
        q, k, v = (torch.randn(2, *size).to(dtype) for size in sizes)
        out, logits = attend_scored(q, k, v, scale=0.3)
        mask = torch.ones(1, 1, queries, num_keys, dtype=torch.bool)
        assert_close(out.double(), dense(q, k, v, mask, None, "softmax", 0.3), rtol=CLOSE[dtype], atol=2 * CLOSE[dtype])
        assert logits is not None and logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        products = q.double() @ k.double().repeat_interleave(query_heads // key_heads, 1).mT * 0.3
        assert_close(logits.double(), products, rtol=1e-5, atol=1e-5)


def test_gradients_of_scored_attention_reach_all_three() -> None:
    q, k, v = (torch.randn(1, h, n, 5, dtype=torch.float64, requires_grad=True) for h, n in ((4, 2), (2, 40), (2, 40)))
    out, logits = attend_scored(q, k, v)
    products = q @ k.repeat_interleave(2, 1).mT * 5**-0.5
    upstream, above = torch.randn_like(out), torch.randn_like(products)
    found = torch.autograd.grad((out * upstream).sum() + (logits * above).sum(), (q, k, v))
    expected = products.softmax(-1) @ v.repeat_interleave(2, 1)
    assert_close(found, torch.autograd.grad((expected * upstream).sum() + (products * above).sum(), (q, k, v)))


def test_what_is_outside_the_ranges_is_never_read() -> None:
    q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 200, 16), torch.randn(1, 2, 200, 16)
    seen = KeyRanges.of([((3, 9), (100, 180))])
    mask = marked([((3, 9), (100, 180))], 4, 200)
    expected = dense(q, k, v, mask, None, "softmax", 0.25)
    hidden = ~mask[0, 0, 0]
    k[:, :, hidden], v[:, :, hidden] = nan, inf
    assert_close(attend_ranges(q, k, v, seen).double(), expected, rtol=CLOSE[q.dtype], atol=CLOSE[q.dtype])


def test_gradients_are_those_of_dense_weights() -> None:
    q, k, v = (torch.randn(1, h, n, 5, dtype=torch.float64) for h, n in ((4, 2), (2, 40), (2, 40)))
    ranges = [((1, 9), (30, 40)), ((0, 4),)]
    mask = marked(ranges, 4, 40)
    found = [x.clone().requires_grad_() for x in (q, k, v)]
    wanted = [x.clone().requires_grad_() for x in (q, k, v)]
    attend_ranges(*found, KeyRanges.of(ranges), scale=0.3).square().sum().backward()
    dense(*wanted, mask, None, "softmax", 0.3).square().sum().backward()
    for one, other in zip(found, wanted, strict=True):
        assert_close(one.grad, other.grad)


@pytest.mark.parametrize("impl", ATTEND_RANGES.names)
def test_every_implementation_sees_the_ranges_or_says_why_not(impl: str) -> None:
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 70, 8), torch.randn(2, 2, 70, 8)
    rows, bias = [((3, 9), (20, 70)), ((0, 4),)], torch.randn(1, 4, 1, 70)
    expected = dense(q, k, v, marked(rows, 4, 70), bias, "softmax", 0.2)
    found = explain(attend_ranges, q, k, v, KeyRanges.of(rows), bias=bias, scale=0.2)
    assert (found.operator, found.call) == ("attend_ranges", {"keys": 60, "of": 70})
    if found.reasons[impl] is not None:
        with pytest.raises(NotImplementedError, match=re.escape(found.reasons[impl])):
            attend_ranges(q, k, v, KeyRanges.of(rows), bias=bias, scale=0.2, impl=impl)
        return
    for chosen in (impl, "auto"):
        with nullcontext() if chosen == impl else forced_impl(impl):
            out = attend_ranges(q, k, v, KeyRanges.of(rows), bias=bias, scale=0.2, impl=chosen)
        assert_close(out.double(), expected, rtol=3e-5, atol=3e-5)


@needs_native
def test_the_kernel_says_what_it_does_not_take() -> None:
    q, k, v, seen = torch.randn(1, 2, 1, 8), *torch.randn(2, 1, 2, 70, 8), KeyRanges.of([((3, 9),)])
    refused: list[tuple[str, tuple[Tensor, ...], dict[str, Any]]] = [
        ("gradients", (q.clone().requires_grad_(), k, v), {}),
        ("float32", (q.double(), k.double(), v.double()), {}),
        ("softmax, sigmoid, relu weights", (q, k, v), {"weights": softmax(sink=torch.zeros(2))}),
        ("float32 bias", (q, k, v), {"bias": torch.zeros(1, 1, 1, 70, dtype=torch.float64)}),
    ]
    for words, heads, options in refused:
        with pytest.raises(NotImplementedError, match=words):
            attend_ranges(*heads, seen, impl="native", **options)


@needs_native
def test_ranges_beyond_the_keys_are_refused() -> None:
    q = k = v = torch.randn(1, 2, 1, 8)
    for pair in ((0, 2), (-1, 1), (1, 0)):
        with pytest.raises(RuntimeError, match="description that no tensors have"):
            attend_ranges(q, k, v, KeyRanges.of([(pair,)]))
    with pytest.raises(ValueError, match="3 heads"):
        attend_ranges(q, k, v, KeyRanges.of([((0, 1),)] * 3))


def test_the_best_blocks_are_those_of_a_sort() -> None:
    for ties in (False, True):
        scores = torch.randn(2, 3, 20)
        scores = scores.round() if ties else scores
        for count, first, own in ((1, 0, 0), (4, 0, 1), (19, 3, 0), (0, 1, 1), (5, 2, 2)):
            keys = 4 * (first + 20 + own) - 1
            seen = KeyRanges.of_best(scores, count, 4, keys, first=first, own=own).mask(keys, scores.device)
            for b, h in ((0, 0), (1, 2)):
                best = sorted(range(20), key=lambda c: (-float(scores[b, h, c]), c))[:count]
                always = [*range(first), *range(first + 20, first + 20 + own)]
                expected = {
                    p for c in [*(c + first for c in best), *always] for p in range(4 * c, min(4 * c + 4, keys))
                }
                assert set(seen[b, h, 0].nonzero().flatten().tolist()) == expected


def test_threads_share_out_long_lists() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for query_heads, key_heads in ((4, 1), (2, 2)):
            q, k, v = torch.randn(1, query_heads, 1, 64), *torch.randn(2, 1, key_heads, 9000, 64)
            for rows in (1, query_heads):
                ranges = drawn(rows, 9000)
                out = attend_ranges(q, k, v, KeyRanges.of(ranges))
                expected = dense(q, k, v, marked(ranges, query_heads, 9000), None, "softmax", 0.125)
                assert_close(out.double(), expected, rtol=CLOSE[q.dtype], atol=CLOSE[q.dtype])
    finally:
        torch.set_num_threads(before)


def test_lists_that_do_not_lie_in_order_are_read_all_the_same() -> None:
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 70, 8), torch.randn(2, 2, 70, 8)
    starts, ranges = torch.tensor([0, 1, 3]), torch.tensor([[3, 9], [0, 20], [50, 70]])
    expected = dense(q, k, v, marked([((3, 9),), ((0, 20), (50, 70))], 4, 70), None, "softmax", 8**-0.5)
    apart = torch.stack([starts, starts], 1)[:, 0], torch.stack([ranges, ranges], 2)[:, :, 1]
    for lists in ((starts, ranges), apart, (starts, ranges.mT.contiguous().mT)):
        assert_close(attend_ranges(q, k, v, KeyRanges(1, 2, *lists)).double(), expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="ranges of 1 entries and 2 heads, but q has 2 and 3"):
            attend_ranges(q[:, :3].requires_grad_(), k, v, KeyRanges(1, 2, *lists))
