"""Native attention over blocks that each query chose for itself: queries that chose the same are gathered."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from tests.support.native_checks import every_dtype, needs_native, one_thread
from torch import Tensor

from foveate import (
    Packed,
    Pattern,
    alibi,
    attend,
    attend_partial,
    causal,
    key_padding,
    sigmoid,
    sinks,
    softmax,
    topk_blocks,
    window,
)
from foveate.attention.impl import native
from foveate.layouts.kinds import Sequence
from foveate.patterns.rules.decided import block_table, pack_rows
from foveate.patterns.select.selection import Selection

pytestmark = [needs_native, pytest.mark.usefixtures(one_thread.__name__)]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}  # of the greatest number


class Choice(NamedTuple):
    """Blocks chosen at random: as a pattern, and as a mask (B or 1, H or 1, N, M)."""

    pattern: Pattern
    mask: Tensor


def choice(
    num_queries: int, num_keys: int, block: int, *, batch: int = 1, heads: int = 1, share: float = 0.2
) -> Choice:
    chosen = torch.rand(batch, heads, num_queries, -(-num_keys // block)) < share
    words = pack_rows(chosen, 1)
    pattern = block_table(words, num_queries, q_block=1, k_block=block, q_start=num_keys - num_queries)
    return Choice(pattern, chosen.repeat_interleave(block, 3)[..., :num_keys])


def inputs(
    num_queries: int, num_keys: int, *, heads: tuple[int, int, int] = (4, 2, 1), dims: tuple[int, int] = (24, 40)
) -> list[Tensor]:
    """q, k, v of two batch entries."""
    (q_heads, k_heads, v_heads), (dim, value_dim) = heads, dims
    sizes = (q_heads, num_queries, dim), (k_heads, num_keys, dim), (v_heads, num_keys, value_dim)
    return [torch.randn(2, *size) for size in sizes]


def place(num_queries: int, num_keys: int) -> Tensor:
    """How far behind each query a key lies, (N, M)."""
    return torch.arange(num_keys - num_queries, num_keys).unsqueeze(1) - torch.arange(num_keys)


def logits_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[3] ** -0.5


def softmax_of(logits: Tensor, v: Tensor, mask: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Heads out and log row sums; rows that see no key give zeros, and -inf."""
    mask = mask.repeat_interleave(logits.shape[1] // mask.shape[1], 1)
    logits = logits.masked_fill(~mask, float("-inf"))
    if sink is not None:
        logits = torch.cat([logits, sink.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], 3)
    lse = logits.logsumexp(3)
    weights = torch.exp(logits - lse.masked_fill(lse.isinf(), 0).unsqueeze(3))[..., : v.shape[2]]
    return weights @ v.repeat_interleave(logits.shape[1] // v.shape[1], 1), lse


def same(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        a, e = a.detach().double(), e.detach()
        assert torch.equal(a.isinf(), e.isinf()), number
        a, e = a.masked_fill(a.isinf(), 0), e.masked_fill(e.isinf(), 0)
        assert float((a - e).abs().max()) <= TOLERANCE[dtype] * float(e.abs().max()), number


def leaves(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in tensors]


def agrees(tensors: list[Tensor], pattern: Pattern, mask: Tensor, dtype: torch.dtype, **options: Any) -> None:
    """Heads out, log row sums, and the gradients of both, are those of the formula in float64."""
    low = leaves(tensors, dtype)
    exact = leaves(low, torch.float64)
    out, lse = attend_partial(*low, pattern, impl="native", **options)
    assert lse is not None
    truth, true_lse = softmax_of(logits_of(*exact[:2]), exact[2], mask)
    d_out, d_lse = torch.randn(out.shape).to(dtype), torch.randn(lse.shape).masked_fill(lse.isinf(), 0)
    grads = torch.autograd.grad((out, lse), low, (d_out, d_lse))
    true_lse = true_lse.masked_fill(true_lse.isinf(), 0)
    true_grads = torch.autograd.grad((truth, true_lse), exact, (d_out.double(), d_lse.double()))
    same([out, lse.masked_fill(lse.isinf(), 0), *grads], [truth, true_lse, *true_grads], dtype)


@pytest.mark.parametrize(("block", "share"), [(64, 0.15), (100, 0.2), (128, 0.3), (320, 0.4), (512, 0.5)], ids=str)
@every_dtype
def test_choices_of_each_query(block: int, share: float, dtype: torch.dtype) -> None:
    num_queries, num_keys = 203, 5 * block - 37
    chosen = choice(num_queries, num_keys, block, batch=2, heads=4, share=share)
    agrees(inputs(num_queries, num_keys), chosen.pattern, chosen.mask, dtype)


@pytest.mark.parametrize("dims", [(1, 1), (64, 64), (33, 130), (128, 16)], ids=str)
@every_dtype
def test_head_sizes(dims: tuple[int, int], dtype: torch.dtype) -> None:
    chosen = choice(130, 390, 128, heads=2)
    agrees(inputs(130, 390, heads=(2, 2, 2), dims=dims), chosen.pattern, chosen.mask, dtype)


@every_dtype
def test_choices_beside_other_patterns(dtype: torch.dtype) -> None:
    num_queries, num_keys = 190, 700
    one = choice(num_queries, num_keys, 64, heads=2, share=0.1)
    distance, real = place(num_queries, num_keys), torch.rand(2, num_keys) < 0.9
    tensors = inputs(num_queries, num_keys)
    agrees(tensors, one.pattern & causal, one.mask & (distance >= 0), dtype)
    near = (distance >= 0) & (distance <= 70)
    agrees(tensors, one.pattern | window(70) & causal, one.mask | near, dtype)
    agrees(tensors, one.pattern | sinks(4), one.mask | (torch.arange(num_keys) < 4), dtype)
    agrees(
        tensors, (one.pattern | causal) & key_padding(real), (one.mask | (distance >= 0)) & real[:, None, None], dtype
    )
    two = choice(num_queries, num_keys, 128, batch=2, share=0.3)
    both = one.mask.repeat_interleave(2, 1) | two.mask
    agrees(tensors, one.pattern | two.pattern, both, dtype)
    agrees(tensors, ~two.pattern, ~two.mask, dtype)


def test_weights_biases_and_caps() -> None:
    num_queries, num_keys = 170, 517
    chosen = choice(num_queries, num_keys, 128, batch=2, heads=4)
    q, k, v = leaves(inputs(num_queries, num_keys), torch.float32)
    sink, slopes, bias = torch.randn(4), torch.rand(4) / 50, torch.randn(2, 4, num_queries, num_keys)
    slopes, bias, sink = leaves([slopes, bias, sink], torch.float32)
    every = [q, k, v, slopes, bias, sink]
    exact = leaves(every, torch.float64)
    logits = logits_of(*exact[:2])
    capped = 1.5 * torch.tanh(logits / 1.5)
    behind = capped - exact[3].view(1, 4, 1, 1) * place(num_queries, num_keys).abs()
    values = exact[2].repeat_interleave(4, 1)
    expected = [
        softmax_of(capped + exact[4], exact[2], chosen.mask)[0],
        softmax_of(behind, exact[2], chosen.mask)[0],
        softmax_of(logits, exact[2], chosen.mask, exact[5])[0],
        (torch.sigmoid(logits - 2) * chosen.mask) @ values,
    ]
    actual = [
        attend(q, k, v, chosen.pattern, bias=bias, softcap=1.5, impl="native"),
        attend(q, k, v, chosen.pattern, bias=alibi(slopes), softcap=1.5, impl="native"),
        attend(q, k, v, chosen.pattern, weights=softmax(sink=sink), impl="native"),
        attend(q, k, v, chosen.pattern, weights=sigmoid(bias=-2.0), impl="native"),
    ]
    seeds = [torch.randn(x.shape) for x in actual]
    grads = torch.autograd.grad(actual, every, seeds)
    true_grads = torch.autograd.grad(expected, exact, [seed.double() for seed in seeds])
    of_slopes = 1e-3 * float(true_grads[3].abs().max())  # sums of all distances, of either sign
    assert torch.allclose(grads[3].double(), true_grads[3], rtol=0, atol=of_slopes)
    others = [(a, e) for i, (a, e) in enumerate(zip(grads, true_grads, strict=True)) if i != 3]
    same([*actual, *(a for a, _ in others)], [*expected, *(e for _, e in others)], q.dtype)


def best_blocks(q: Tensor, k: Tensor, block: int, count: int) -> Tensor:
    """The mask of causal topk_blocks(block, count), a query at a time; of equal scores the first block counts."""
    mask = torch.zeros(*q.shape[:2], q.shape[2], k.shape[2], dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        head, own = k[b, h // (q.shape[1] // k.shape[1])], i // block
        means = head[: own * block].view(own, block, k.shape[3]).mean(1)
        order = torch.sort(means @ q[b, h, i], descending=True, stable=True).indices[: count - 1]
        for chosen in (*order.tolist(), own):
            mask[b, h, i, chosen * block : (chosen + 1) * block] = True
    return mask.tril()


def whole_numbers(*shape: int) -> Tensor:
    """Whose means over blocks, and products with these, no precision rounds."""
    return torch.randint(-3, 4, shape).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_best_blocks(dtype: torch.dtype) -> None:
    q, k, v = whole_numbers(1, 2, 470, 16), whole_numbers(1, 1, 470, 16), torch.randn(1, 1, 470, 19)
    agrees([q, k, v], topk_blocks(64, 3), best_blocks(q, k, 64, 3), dtype)


def test_the_best_blocks_of_each_document() -> None:
    lengths = (301, 260)
    q, k, v = whole_numbers(1, 2, 561, 16), whole_numbers(1, 2, 561, 16), torch.randn(1, 2, 561, 8)
    masks = [best_blocks(*own, 64, 2) for own in zip(q.split(lengths, 2), k.split(lengths, 2), strict=True)]
    mask = torch.zeros(1, 2, 561, 561, dtype=torch.bool)
    mask[:, :, :301, :301], mask[:, :, 301:, 301:] = masks
    agrees([q, k, v], topk_blocks(64, 2), mask, torch.float32, layout=Packed(lengths))


@every_dtype
def test_keys_that_nobody_sees_do_not_matter(dtype: torch.dtype) -> None:
    chosen = choice(140, 640, 64, share=0.1)
    mask = chosen.mask.clone()
    mask[..., :128], mask[:, :, 5] = False, True  # whole blocks that nobody sees, and a query that sees all others
    words = pack_rows(mask[..., ::64], 1)
    pattern = block_table(words, 140, q_block=1, k_block=64, q_start=500)
    mask[..., :128] = False
    pattern, (q, k, v) = pattern & ~sinks(128), leaves(inputs(140, 640), dtype)
    out = attend(q, k, v, pattern, impl="native")
    spoiled = [x.detach().clone() for x in (k, v)]
    for x in spoiled:
        x[:, :, :128] = float("nan")
    again = [q, *(x.requires_grad_() for x in spoiled)]
    spoiled_out = attend(*again, pattern, impl="native")
    assert torch.equal(out, spoiled_out)
    seed = torch.randn(out.shape).to(dtype)
    grads, others = (torch.autograd.grad(o, x, seed) for o, x in ((out, (q, k, v)), (spoiled_out, again)))
    assert torch.equal(grads[0], others[0])
    assert all(torch.equal(a[:, :, 128:], b[:, :, 128:]) for a, b in zip(grads[1:], others[1:], strict=True))


def test_a_number_that_is_not_finite_spoils_those_who_see_it() -> None:
    chosen = choice(200, 512, 128)
    q, k, v = inputs(200, 512)
    v[:, :, 300] = float("inf")
    out = attend(q, k, v, chosen.pattern, impl="native")
    spoiled = ~out.isfinite().all(3)
    assert torch.equal(spoiled, chosen.mask[..., 300].expand_as(spoiled))
    v[:, :, 300] = 0
    fine = attend(q, k, v, chosen.pattern, impl="native")
    assert torch.allclose(out[~spoiled], fine[~spoiled], atol=1e-6)


def test_threads_change_nothing() -> None:
    chosen = choice(1500, 1500, 128, heads=2)
    tensors = leaves(inputs(1500, 1500, heads=(2, 1, 1)), torch.float32)
    found = []
    for threads in (1, 3, 3):
        torch.set_num_threads(threads)
        out = attend(*tensors, chosen.pattern, impl="native")
        found.append([out, *torch.autograd.grad(out, tensors, torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found[0], found[1], strict=True))


def test_only_pairs_that_were_chosen_are_formed() -> None:
    chosen = choice(1000, 4096, 512, heads=2, share=0.1)
    q, k, _ = inputs(1000, 4096)
    selection = native.select(q, k, chosen.pattern, Sequence(), 1.0, plain=True)
    assert isinstance(selection, Selection)
    assert torch.equal(selection.to_dense(), chosen.mask)
    assert selection.pairs == int(chosen.mask.sum())
    assert selection.computed < 1.05 * selection.density
