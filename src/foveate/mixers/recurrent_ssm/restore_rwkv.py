"""Restore-RWKV: RWKV's averages in both directions, along the rows of an image and then along its columns."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from foveate.catalogue.registry import register
from foveate.layouts.orders import Order, column_major, raster
from foveate.mixers.base import Mixer
from foveate.patterns import Grid, Layout
from foveate.recurrence.bi_wkv import bi_wkv

SIDES = (1, 3, 5)
HIDDEN = -1e9  # the key of a token that is padding: its weight is 0 beside any other


class OmniShift(nn.Module):
    """Each channel of an image and its convolutions with 1, 3 and 5 pixels a side, added with learned weights.

    A sum of convolutions is one convolution, by the sum of their kernels: only that one is ever run.

    >>> OmniShift(6)(torch.randn(2, 35, 6), Grid(5, 7)).shape
    torch.Size([2, 35, 6])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.kernels = nn.ParameterList(
            torch.empty(channels, 1, side, side).uniform_(-1 / side, 1 / side) for side in SIDES
        )
        self.shares = nn.Parameter(torch.randn(1 + len(SIDES)))

    def merged(self) -> Tensor:
        """The kernel (C, 1, 5, 5) that equals all branches together."""
        branches = [torch.ones_like(self.kernels[0]), *self.kernels]
        widest = [pad(kernel, (max(SIDES) // 2 - kernel.shape[-1] // 2,) * 4) for kernel in branches]
        return torch.einsum("b,bcoij->coij", self.shares, torch.stack(widest))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Convolve tokens x (B, H * W, C)."""
        if not x.shape[0]:
            return x
        image = x.mT.unflatten(2, grid.dims)
        return conv2d(image, self.merged(), padding=max(SIDES) // 2, groups=x.shape[2]).flatten(2).mT


@register(
    "restore_rwkv",
    papers=("Restore-RWKV",),
    formula=(
        "v ← biwkv(k, v) along rows, v ← biwkv(k, v) along columns, o = W(σ(r) ⊙ v), "
        "biwkv_t = (Σ_{i ≠ t} e^(k_i - (|t-i|-1) w/T) v_i + e^(k_t + u/T) v_t) / (the same without v)"
    ),
    supports={"noncausal", "padding", "grid"},
    notes="Re-WKV after Omni-Shift; the bonus is divided by T as well, as in the authors' code.",
)
class RestoreRWKV(Mixer):
    """Averages over all pixels by weights that decay with the distance along the rows, then along the columns.

    ``passes`` is how often values are averaged, by turns along rows and columns; each has rates of its own.
    """

    grids: ClassVar[tuple[Layout, ...]] = (Grid(5, 7), Grid(8, 3))

    grid_axes = (2,)

    def __init__(self, dim: int, *, passes: int = 2, causal: bool = False) -> None:
        super().__init__(dim, causal=causal)
        if passes < 1:
            raise ValueError(f"passes is how often values are averaged, 1 or more; got {passes}")
        self.shift = OmniShift(dim)
        self.to_r, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.rates, self.bonuses = nn.Parameter(torch.randn(passes, dim)), nn.Parameter(torch.randn(passes, dim))

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        assert isinstance(layout, Grid)
        x = self.shift(x, layout)
        k, v = self.to_k(x), self.to_v(x)
        if padding is not None:
            k = k.masked_fill(~padding.unsqueeze(-1), HIDDEN)
        for rate, bonus, order in zip(self.rates, self.bonuses, self.paths(layout), strict=True):
            v = order.undo(bi_wkv(order.apply(k), order.apply(v), rate / x.shape[1], bonus / x.shape[1]))
        return self.to_out(torch.sigmoid(self.to_r(x)) * v)

    def paths(self, grid: Grid) -> list[Order]:
        """Along the rows, along the columns, and so on."""
        return [(raster, column_major)[number % 2](grid) for number in range(len(self.rates))]
