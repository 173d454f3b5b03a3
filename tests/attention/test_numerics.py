"""Great logits, and numbers that are not finite: the error of plain arithmetic, and what is unseen is unread."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.support.native_checks import needs_native, one_thread
from torch import Tensor

from foveate import Grid, Packed, attend, attend_partial, causal, key_padding, neighborhood, sinks, window
from foveate.layouts.kinds import Layout
from foveate.patterns import Pattern

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
IMPLS = ("tiles", pytest.param("native", marks=needs_native))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def softmax_rows(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    logits = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    return torch.softmax(logits, -1) @ v


def gradients(run: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def exact_logits(size: float, num_queries: int, num_keys: int, dim: int) -> tuple[Tensor, Tensor]:
    """Queries and keys whose products are ``size`` and a few sixteenths, in any order of summation.

    Of random ones, two logits of a row sometimes lie within a rounding of each other: whose error is greater is luck.
    """
    q, k = (torch.randint(-2, 3, (2, 3, n, dim)).float() for n in (num_queries, num_keys))
    q[..., 0], k[..., 1:], k[..., 0] = 1, k[..., 1:] / 16, size
    return q, k


def check(q: Tensor, k: Tensor, pattern: Pattern, layout: Layout | None, impl: str) -> None:
    v, grad = torch.randn(*k.shape[:3], 17), torch.randn(*q.shape[:3], 17)
    seen = pattern.mask(q.shape[2], k.shape[2], layout=layout)
    plain = gradients(lambda *x: softmax_rows(*x, seen, 1), [q, k, v], grad, torch.float32)
    exact = gradients(lambda *x: softmax_rows(*x, seen, 1), [q, k, v], grad, torch.float64)
    run = lambda *x: attend(*x, pattern, scale=1, layout=layout, impl=impl)  # noqa: E731
    found = gradients(run, [q, k, v], grad, torch.float32)
    weights = torch.softmax((q @ k.mT).masked_fill(~seen, -torch.inf), -1)
    slopes = weights * (grad.abs() @ v.abs().mT)
    summed = [weights @ v.abs(), slopes @ k.abs(), slopes.mT @ q.abs(), weights.mT @ grad.abs()]
    for name, mine, theirs, truth, sums in zip(("out", "dq", "dk", "dv"), found, plain, exact, summed, strict=True):
        errors = [float((x.double() - truth).norm()) for x in (mine, theirs)]
        allowed = 2 * errors[1] + 2 * torch.finfo(torch.float32).eps * float(sums.norm())
        assert errors[0] <= allowed, f"{name}: {errors[0]:.3g}, plain {errors[1]:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_queries", [1, 5, 77, 201])
@pytest.mark.parametrize("size", [1e2, -1e3, 1e4, 5e4])
@pytest.mark.parametrize("pattern", [causal, causal & window(90) | sinks(3)], ids=str)
def test_great_logits_err_no_more_than_plain_arithmetic(
    impl: str, num_queries: int, size: float, pattern: Pattern
) -> None:
    check(*exact_logits(size, num_queries, 201, 24), pattern, None, impl)


@needs_native
@pytest.mark.parametrize("size", [1e2, 1e4, 5e4])
def test_great_logits_of_windows_on_a_grid(size: float) -> None:
    check(*exact_logits(size, 660, 660, 16), neighborhood((5, 7)), Grid(20, 33), "native")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_queries", [1, 9, 16, 130])
@pytest.mark.parametrize("size", [1e2, 1e4, 5e4])
def test_weights_of_a_row_sum_to_one_in_the_backward_pass_too(impl: str, num_queries: int, size: float) -> None:
    q, k = torch.randn(2, 4, num_queries, 40), torch.randn(2, 2, 300, 40)
    v = torch.zeros(2, 2, 300, 3, requires_grad=True)
    attend(q, k, v, causal, scale=size / 40**0.5, impl=impl).sum().backward()
    assert v.grad is not None
    torch.testing.assert_close(v.grad.sum(2), torch.full((2, 2, 3), 2.0 * num_queries), rtol=3e-6, atol=0)


def test_log_row_sums_that_users_see_stay_as_they_were() -> None:
    q = torch.randn(1, 2, 70, 8)
    for impl in ("tiles", "auto"):
        assert attend_partial(q, q, q, causal, impl=impl).lse.dtype == torch.float32
    assert attend_partial(*3 * [q.double()], causal, impl="tiles").lse.dtype == torch.float64


PADDED = torch.arange(150) >= torch.tensor([[13], [70]])
CASES: dict[str, tuple[Pattern, Layout | None]] = {
    "packed": (causal, Packed([37, 41, 50, 22])),
    "packed lists": (window(20) & causal | sinks(2), Packed([37, 41, 50, 22])),
    "window": (window(11) & causal, None),
    "left padding": (key_padding(PADDED) & causal, None),
    "neighborhood": (neighborhood((3, 3)), Grid(10, 15)),
    "wide neighborhood": (neighborhood((3, 15)), Grid(10, 15)),
    "few see all": (causal & window(9) | sinks(2) & window(60), None),
}


def poisoned(x: Tensor, keys: list[int], poison: float) -> Tensor:
    x = x.clone()
    x[:, :, keys, 1] = poison
    return x


@needs_native
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", ["softmax", "sigmoid"])
def test_what_is_unseen_is_unread(case: str, dtype: torch.dtype, weights: str) -> None:
    """Rows that see no poisoned key, and keys that no row sees together with one, are as if it were not there."""
    pattern, layout = CASES[case]
    q, k, v, grad = (torch.randn(2, 2, 150, 16) for _ in range(4))
    seen = pattern.mask(150, layout=layout)
    if isinstance(layout, Packed):
        number = torch.repeat_interleave(torch.arange(4), torch.tensor(layout.lengths))
        seen = seen & (number[:, None] == number)
    keys = [3, 64, 140]
    hit = seen[..., keys].any(-1)  # rows, (batches, heads, N)
    touched = (seen & hit.unsqueeze(-1)).any(-2)  # keys that such a row sees
    for poison in (torch.nan, torch.inf, -torch.inf):
        for name in "kv":
            clean, dirty = {"q": q, "k": k, "v": v}, {"q": q, "k": k, "v": v}
            dirty[name] = poisoned(dirty[name], keys, poison)
            grad_out = torch.where(
                hit.expand(2, 2, -1).unsqueeze(-1), 0.0, grad
            )  # a loss without the rows that are hit
            results = []
            for inputs in (clean, dirty):
                leaves = {n: x.to(dtype).requires_grad_() for n, x in inputs.items()}
                out = attend(**leaves, pattern=pattern, layout=layout, weights=weights, impl="native")
                results.append([out, *torch.autograd.grad(out, leaves.values(), grad_out.to(dtype))])
            for what, was, now in zip(("out", "dq", "dk", "dv"), *results, strict=True):
                fine = ~(hit if what in ("out", "dq") else touched).expand(2, 2, -1)
                assert now[fine].isfinite().all(), f"{what} with {poison} in {name}"
                tolerance = 1e-4 if dtype == torch.float32 else 0.03
                torch.testing.assert_close(now[fine], was[fine], rtol=tolerance, atol=tolerance)
            if name == "v" and poison != poison:
                assert results[1][0][hit.expand(2, 2, -1)].isnan().any(-1).all(), "who sees it has it"


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("num_queries", [1, 3, 9])
def test_unseen_keys_of_few_queries(dtype: torch.dtype, heads: int, num_queries: int) -> None:
    pattern = window(33) & causal
    q = torch.randn(2, 2 * heads, num_queries, 32).to(dtype)
    k, v = (torch.randn(2, 2, 300, 32).to(dtype) for _ in "kv")
    clean = attend(q, k, v, pattern, impl="native")
    seen = pattern.mask(num_queries, 300)[0, 0]
    for j in (300 - num_queries - 33, 299):
        for poison in (torch.nan, torch.inf):
            rows = ~seen[:, j]
            assert seen[:, j].any() or j < 299
            for keys, values in ((k.clone(), v), (k, v.clone())):
                (keys if values is v else values)[:, :, j] = poison
                found = attend(q, keys, values, pattern, impl="native")
                tolerance = 1e-5 if dtype == torch.float32 else 0.02
                torch.testing.assert_close(found[:, :, rows], clean[:, :, rows], rtol=tolerance, atol=tolerance)


@needs_native
def test_gradients_that_are_not_finite_stay_with_what_their_rows_see() -> None:
    q, k, v, grad = (torch.randn(1, 2, 130, 8) for _ in range(4))
    bias = torch.randn(2, 130, 130)
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    out = attend(q, k, v, causal & window(10), bias=bias, impl="native")
    clean = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    grad[:, :, 70] = torch.nan
    dirty = torch.autograd.grad(out, leaves, grad)
    others = torch.arange(130) != 70
    unseen = (torch.arange(130) <= 60 - 1) | (torch.arange(130) > 70)
    for was, now, rows in zip(clean[:3], dirty[:3], (others, unseen, unseen), strict=True):
        torch.testing.assert_close(now[:, :, rows], was[:, :, rows])
    torch.testing.assert_close(dirty[3][:, others], clean[3][:, others])
