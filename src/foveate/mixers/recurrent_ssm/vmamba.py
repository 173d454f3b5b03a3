"""VMamba: an image scanned along rows and columns, forwards and backwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Unpack

from torch import Tensor, nn
from torch.nn.functional import silu

from foveate.catalogue.registry import register
from foveate.layouts.orders import (
    Order,
    cross_scan,
)
from foveate.mixers.recurrent_ssm.mamba import SelectiveScan, StateOptions
from foveate.mixers.recurrent_ssm.scan_mixer import ScanMixer
from foveate.patterns import Grid, Layout


@register(
    "vmamba",
    papers=("VMamba / SS2D",),
    formula="out = W (norm(Σ_d undo_d(scan_d(order_d(silu(conv2d(u)))))) ⊙ silu(z)), d: rows, columns, reverses",
    supports={"noncausal", "padding", "grid"},
    notes="The gated block of the paper's first version; gate=False is that of its later ones.",
)
class VMamba(ScanMixer):
    """SS2D: an image scanned along its rows, its columns, and both backwards, so that every pixel sees all others.

    ``axes`` is 2, or 3 for videos, which are scanned in six directions; ``conv`` is the side of the convolution.
    ``gate=False`` is the block of the paper's later versions, whose convolution has no bias either.
    """

    grids: ClassVar[tuple[Layout, ...]] = (Grid(5, 7), Grid(8, 3))

    def __init__(
        self,
        dim: int,
        *,
        axes: int = 2,
        expand: int = 2,
        conv: int = 3,
        gate: bool = True,
        causal: bool = False,
        **sizes: Unpack[StateOptions],
    ) -> None:
        super().__init__(dim, expand=expand, passes=2 * axes, gate=gate, causal=causal, **sizes)
        if axes not in (2, 3):
            raise ValueError(f"axes is 2 for images or 3 for videos; got {axes}")
        if conv < 1 or conv % 2 == 0:
            raise ValueError(f"the convolution has an odd number of pixels a side; got conv={conv}")
        self.grid_axes = (axes,)
        kind = nn.Conv2d if axes == 2 else nn.Conv3d
        self.conv = kind(self.inner, self.inner, conv, padding=conv // 2, groups=self.inner, bias=gate)
        self.norm = nn.LayerNorm(self.inner)

    def one_pass(self, *, state: int, conv: int, rank: int) -> SelectiveScan:
        return SelectiveScan(self.inner, state, rank)

    def before(self, u: Tensor, layout: Layout) -> Tensor:
        assert isinstance(layout, Grid)
        return silu(self.conv(u.mT.unflatten(2, layout.dims))).flatten(2).mT

    def after(self, y: Tensor) -> Tensor:
        return self.norm(y)

    def orders(self, layout: Layout) -> Sequence[Order]:
        assert isinstance(layout, Grid)
        return cross_scan(layout)
