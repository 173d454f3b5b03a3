"""Windows cut tiles at their edges: the native kernels there, against softmax written out in float64."""

from __future__ import annotations

import pytest
import torch
from tests.support.native_checks import every_dtype, needs_native, one_thread
from torch import Tensor

from foveate import Packed, attend_partial, blocks, causal, relative_table, sigmoid, sinks, window

pytestmark = [needs_native, pytest.mark.usefixtures(one_thread.__name__)]

FINE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the norm of a result
HEADS = ((2, 2, 2), (4, 2, 1))  # of queries, keys and values
SIDES = [(1, 0), (63, 0), (64, 0), (65, 0), (250, 0), (14, 77), (0, 300), (200, 129)]  # keys before and after


def distances(num_queries: int, num_keys: int) -> Tensor:
    """How far each key lies before each query, where the last query stands at the last key."""
    return torch.arange(num_queries)[:, None] + num_keys - num_queries - torch.arange(num_keys)


def inputs(
    heads: tuple[int, int, int], num_queries: int, num_keys: int, dims: tuple[int, int], dtype: torch.dtype
) -> list[Tensor]:
    lengths, widths = (num_queries, num_keys, num_keys), (dims[0], *dims)
    sides = zip(heads, lengths, widths, strict=True)
    return [torch.randn(1, h, n, d).to(dtype).requires_grad_() for h, n, d in sides]


def assert_sees(visible: Tensor, tensors: list[Tensor], **call: object) -> None:
    """Native attention and its gradients are those of softmax over the visible pairs, all but for rounding."""
    q, k, v = tensors
    seeds = torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype), torch.randn(q.shape[:3])
    found = attend_partial(*tensors, impl="native", **call)  # type: ignore[arg-type]
    sees_none = ~visible.any(-1)
    d_lse = seeds[1].masked_fill(sees_none, 0)
    grads = torch.autograd.grad([found.out, found.lse], tensors, [seeds[0], d_lse])
    exact = [x.detach().double().requires_grad_() for x in tensors]
    q, k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in exact)
    logits = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~visible, -torch.inf)
    lse = logits.logsumexp(-1)
    out = torch.where(visible, (logits - lse.masked_fill(sees_none, 0)[..., None]).exp(), 0) @ v
    truths = torch.autograd.grad([out, lse], exact, [seeds[0].double(), d_lse.double()])
    names = ("out", "lse", "dq", "dk", "dv")
    found_lse = found.lse.masked_fill(sees_none, 0)
    results = (found.out, found_lse, *grads), (out, lse.masked_fill(sees_none, 0), *truths)
    for name, actual, truth in zip(names, *results, strict=True):
        error = float((actual.detach().double() - truth.detach()).norm())
        assert error <= FINE[found.out.dtype] * float(truth.detach().norm()) + 1e-30, (
            f"{name}: {error:.2e} of {truth.norm():.2e}"
        )


@pytest.mark.parametrize("left, right", SIDES)
@every_dtype
def test_windows_of_any_width(left: int, right: int, dtype: torch.dtype) -> None:
    tensors = inputs(HEADS[left % 2], 901, 901, (64, 32), dtype)
    apart = distances(901, 901)
    assert_sees((apart <= left) & (apart >= -right), tensors, pattern=window(left, right))


@pytest.mark.parametrize("lengths", [(1, 1), (63, 63), (65, 65), (129, 700), (700, 129), (577, 1100)], ids=str)
@every_dtype
def test_windows_over_any_lengths(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    """Queries before the first key see nothing."""
    tensors = inputs((4, 2, 4), *lengths, (32, 64), dtype)
    apart = distances(*lengths)
    assert_sees((apart >= 0) & (apart <= 70), tensors, pattern=window(70) & causal)
    assert_sees((apart >= -9) & (apart <= 40), tensors, pattern=window(40, 9))


@pytest.mark.parametrize("dims", [(64, 64), (40, 17), (128, 96)], ids=str)
@every_dtype
def test_windows_beside_other_patterns(dims: tuple[int, int], dtype: torch.dtype) -> None:
    apart, first = distances(517, 517), torch.arange(517) < 5
    seen = (apart >= 0) & (apart <= 130)
    assert_sees(
        seen | first & (apart >= 0), inputs((2, 1, 2), 517, 517, dims, dtype), pattern=(window(130) | sinks(5)) & causal
    )
    same = torch.arange(517)[:, None] // 100 == torch.arange(517) // 100
    assert_sees(seen & same, inputs((2, 2, 2), 517, 517, dims, dtype), pattern=blocks(100) & window(130) & causal)


@every_dtype
def test_windows_in_packed_sequences(dtype: torch.dtype) -> None:
    lengths = [130, 1, 300, 0, 86]
    document = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    apart = distances(517, 517)
    seen = (apart >= 0) & (apart <= 65) & (document[:, None] == document)
    assert_sees(seen, inputs((4, 2, 2), 517, 517, (64, 64), dtype), pattern=window(65) & causal, layout=Packed(lengths))


@pytest.mark.parametrize("threads", [2, 3])
def test_windows_on_several_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    apart = distances(1001, 1001)
    assert_sees(
        (apart >= 0) & (apart <= 65),
        inputs((4, 2, 1), 1001, 1001, (64, 64), torch.float32),
        pattern=window(65) & causal,
    )


@every_dtype
def test_unseen_keys_of_a_cut_tile_are_hidden_whatever_they_are(dtype: torch.dtype) -> None:
    """NaN and infinity reach the queries that see them, and no others."""
    q, k, v = (x.detach() for x in inputs((2, 2, 2), 400, 400, (32, 32), dtype))
    clean = attend_partial(q, k, v, window(70) & causal, impl="native").out
    k[:, :, 200], v[:, :, 300] = torch.nan, torch.inf
    strange = attend_partial(q, k, v, window(70) & causal, impl="native").out.isfinite().all(-1)[0, 0]
    sees = torch.zeros(400, dtype=torch.bool)
    sees[200:271], sees[300:371] = True, True
    assert torch.equal(strange, ~sees)
    again = attend_partial(q, k, v, window(70) & causal, impl="native").out
    assert torch.allclose(again[:, :, ~sees], clean[:, :, ~sees], atol=2e-2 if dtype != torch.float32 else 1e-6)


@pytest.mark.parametrize("weights", ["softmax", "sigmoid"])
def test_biases_of_a_window_get_no_gradient_from_hidden_pairs(weights: str) -> None:
    q, k, v = (x.double() for x in inputs((2, 2, 2), 300, 300, (16, 16), torch.float32))
    table = torch.randn(2, 2 * 100 + 1, dtype=torch.float64)
    results = []
    for dtype, impl in ((torch.float64, "reference"), (torch.float32, "native")):
        parameter = table.to(dtype).requires_grad_()
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        how = {"weights": sigmoid(bias=torch.tensor([-2.0], dtype=dtype))} if weights == "sigmoid" else {}
        out = attend_partial(*leaves, window(77, 20), bias=relative_table(parameter), impl=impl, **how).out  # type: ignore[arg-type]
        seed = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype)
        results.append([out, *torch.autograd.grad(out, [*leaves, parameter], seed)])
    for truth, actual in zip(*([x.detach() for x in result] for result in results), strict=True):
        assert float((actual.double() - truth).norm()) <= 1e-5 * float(truth.norm())
    unseen = [i for i in range(201) if not -20 <= i - 100 <= 77]
    assert not results[1][-1][:, unseen].any()
