"""Bidirectional WKV by scans against all pairs, Omni-Shift against its branches, and Restore-RWKV written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.testing import assert_close

from foveate.catalogue.registry import row
from foveate.mixers.recurrent_ssm.restore_rwkv import OmniShift, RestoreRWKV
from foveate.patterns import Grid
from foveate.recurrence.bi_wkv import bi_wkv

B, C = 2, 5


def by_pairs(k: Tensor, v: Tensor, rate: Tensor, bonus: Tensor) -> Tensor:
    """The formula for one sequence and channel after the other, in plain Python numbers."""
    length = k.shape[1]
    out = torch.empty_like(v)
    for b in range(k.shape[0]):
        for c in range(k.shape[2]):
            for t in range(length):
                logits = [k[b, i, c] + (bonus[c] if i == t else -(abs(t - i) - 1) * rate[c]) for i in range(length)]
                out[b, t, c] = torch.stack(logits).softmax(0) @ v[b, :, c]
    return out


def inputs(length: int, *, rate: float = 0.3) -> tuple[Tensor, ...]:
    k, v = torch.randn(2, B, length, C, dtype=torch.float64)
    return k, v, rate * torch.randn(C, dtype=torch.float64), torch.randn(C, dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 2, 19])
@pytest.mark.parametrize("impl", ["scan", "reference"])
def test_it_is_the_formula_over_all_pairs(length: int, impl: str) -> None:
    """Rates of both signs: weights that fade with the distance, and such that grow."""
    given = inputs(length)
    assert_close(bi_wkv(*given, impl=impl), by_pairs(*given), atol=1e-10, rtol=1e-10)


def test_gradients_are_those_of_the_formula() -> None:
    leaves = [x.requires_grad_() for x in inputs(23)]
    towards = torch.randn(B, 23, C, dtype=torch.float64)
    mine, expected = (
        torch.autograd.grad((bi_wkv(*leaves, impl=impl) * towards).sum(), leaves) for impl in ("scan", "reference")
    )
    for one, other in zip(mine, expected, strict=True):
        assert_close(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("scale", [30.0, 3000.0])
def test_no_key_overflows(scale: float) -> None:
    k, v, rate, bonus = (x.float() for x in inputs(40))
    out = bi_wkv(scale * k, v, rate, bonus)
    exact = bi_wkv((scale * k).double(), v.double(), rate.double(), bonus.double(), impl="reference")
    assert_close(out.double(), exact, atol=1e-3 * (scale / 30), rtol=1e-3)
    assert out.isfinite().all()


def test_a_constant_is_its_own_average_and_reversal_commutes() -> None:
    k, v, rate, bonus = inputs(31)
    assert_close(bi_wkv(k, torch.full_like(v, 7.0), rate, bonus), torch.full_like(v, 7.0))
    assert_close(bi_wkv(k.flip(1), v.flip(1), rate, bonus).flip(1), bi_wkv(k, v, rate, bonus))


def test_its_cost_grows_with_the_length_not_its_square() -> None:
    k, v = torch.randn(2, 1, 40_000, 3)
    out = bi_wkv(k, v, torch.rand(3) / 40_000, torch.zeros(3))  # 40,000^2 weights would take 19 GB
    assert out.isfinite().all() and (out.abs() <= v.abs().amax(1, keepdim=True)).all()


def test_half_precision_comes_back_in_half_precision() -> None:
    k, v, rate, bonus = (x.bfloat16() for x in inputs(33))
    out = bi_wkv(k, v, rate, bonus)
    assert out.dtype == torch.bfloat16
    assert_close(out.double(), by_pairs(*(x.double() for x in (k, v, rate, bonus))), atol=2**-7, rtol=2**-7)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda k, v, w, u: bi_wkv(k, v[:, 1:], w, u), "batch, length, channels"),
        (lambda k, v, w, u: bi_wkv(k, v, w[1:], u), "one number a channel"),
        (lambda k, v, w, u: bi_wkv(k, v, w, u, impl="native"), "reference"),
    ],
)
def test_what_does_not_fit_is_refused(change: Callable[..., Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        change(*inputs(4))


# ---- Omni-Shift, and the mixer -----------------------------------------------------------------------------


def test_one_merged_kernel_equals_the_sum_of_the_branches() -> None:
    shift, grid = OmniShift(C).double(), Grid(6, 7)
    x = torch.randn(B, grid.length, C, dtype=torch.float64)
    image = x.mT.unflatten(2, grid.dims)
    branches = [conv2d(image, kernel, padding=kernel.shape[-1] // 2, groups=C) for kernel in shift.kernels]
    expected = sum(share * branch for share, branch in zip(shift.shares, [image, *branches], strict=True))
    assert [kernel.shape[-1] for kernel in shift.kernels] == [1, 3, 5]
    assert shift.merged().shape == (C, 1, 5, 5)
    assert_close(shift(x, grid), expected.flatten(2).mT)


def make(passes: int = 2) -> RestoreRWKV:
    mixer = row("restore_rwkv").mixer(C, passes=passes).double()
    assert isinstance(mixer, RestoreRWKV)
    return mixer


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_values_are_averaged_along_rows_and_columns_by_turns(passes: int) -> None:
    mixer, (height, width) = make(passes), (4, 5)
    x = torch.randn(B, height * width, C, dtype=torch.float64)
    shifted = mixer.shift(x, Grid(height, width))
    k, v = mixer.to_k(shifted), mixer.to_v(shifted)
    for number in range(passes):
        rate, bonus = mixer.rates[number] / 20, mixer.bonuses[number] / 20
        if number % 2 == 0:
            v = by_pairs(k, v, rate, bonus)
        else:
            columns = [y.view(B, height, width, C).transpose(1, 2).flatten(1, 2) for y in (k, v)]
            v = by_pairs(*columns, rate, bonus).view(B, width, height, C).transpose(1, 2).flatten(1, 2)
    expected = mixer.to_out(torch.sigmoid(mixer.to_r(shifted)) * v)
    assert_close(mixer(x, layout=Grid(height, width)), expected, atol=1e-9, rtol=1e-9)


def test_every_pixel_sees_every_other() -> None:
    mixer, grid = make(), Grid(6, 9)
    x = torch.randn(1, grid.length, C, dtype=torch.float64, requires_grad=True)
    out = mixer(x, layout=grid)
    for pixel in torch.randint(grid.length, (3,)).tolist():
        (gradient,) = torch.autograd.grad(out[0, pixel].sum(), x, retain_graph=True)
        assert (gradient[0].abs().amax(-1) > 0).all()


def test_a_sequence_without_a_grid_and_no_passes_are_refused() -> None:
    with pytest.raises(ValueError, match="grid of 2 axes"):
        make()(torch.randn(1, 12, C, dtype=torch.float64))
    with pytest.raises(ValueError, match="1 or more"):
        make(0)
