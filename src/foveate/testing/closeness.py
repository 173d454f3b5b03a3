"""How close is close: exact arithmetic against exact arithmetic, and low precision against its own limits."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from foveate.options import forced_impl


def reference_only() -> AbstractContextManager[None]:
    """Inside, every operator runs its definition.

    >>> from foveate import attend
    >>> with reference_only():
    ...     attend(*torch.randn(3, 1, 2, 5, 8)).shape
    torch.Size([1, 2, 5, 8])
    """
    return forced_impl("reference")


def assert_same(what: str, actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """No element off by more than ``tolerance`` of the greatest one (or of 1)."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if not actual.numel():
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    off = (actual - expected).abs()
    worst, allowed = float(off.max()), tolerance * max(1.0, float(expected.abs().max()))
    where = tuple(int(i) for i in torch.unravel_index(off.argmax(), off.shape))
    assert worst <= allowed, f"{what}: off by {worst:.3g} at {where}, allowed {allowed:.3g}"


def assert_twice(
    what: str, actual: Tensor, plain: Tensor, exact: Tensor, *, roundings: float = 1.0, size: float | None = None
) -> None:
    """Error at most twice that of a plain implementation in the same precision, plus so many roundings.

    A rounding is relative to ``size``, the norm of the exact result by default; where that is what is left of
    greater numbers that cancel, theirs.
    """
    assert actual.dtype == plain.dtype, f"{what}: {actual.dtype}, not {plain.dtype}"
    size = float(exact.detach().norm()) if size is None else size
    mine, plains = (float((low.detach().double() - exact.detach()).norm()) for low in (actual, plain))
    allowed = 2 * plains + roundings * torch.finfo(actual.dtype).eps * size
    said = f"error {mine / max(size, 1e-300):.3g} of its size, the definition's {plains / max(size, 1e-300):.3g}"
    assert mine <= allowed, f"{what} in {actual.dtype}: {said}"


def assert_zero(what: str, tensor: Tensor) -> None:
    """Exactly zero, everywhere."""
    if tensor.numel():
        worst = float(tensor.detach().abs().max())
        assert worst == 0, f"{what}: {worst:.3g}, not 0"
