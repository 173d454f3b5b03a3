"""VideoMamba: videos scanned forwards and backwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from foveate.catalogue.registry import register
from foveate.layouts.orders import (
    Order,
    spatio_temporal,
)
from foveate.mixers.grid import require_grid
from foveate.mixers.recurrent_ssm.audio_mamba import BidirectionalMamba
from foveate.patterns import Grid, Layout


@register(
    "videomamba",
    papers=("VideoMamba (ST-SSM)",),
    formula="out = W ((scan(u) + reverse(scan'(reverse(u)))) ⊙ silu(z)), u frame after frame",
    supports={"noncausal", "padding", "grid"},
)
class VideoMamba(BidirectionalMamba):
    """Scans of a video forwards and backwards, in space and time at once.

    ``first`` says which is walked first: "space", frame after frame, or "time", pixel after pixel.
    """

    grids: ClassVar[tuple[Layout, ...]] = (Grid(3, 4, 3), Grid(2, 5, 7))

    def __init__(
        self,
        dim: int,
        *,
        first: str = "space",
        expand: int = 2,
        state: int = 16,
        conv: int = 4,
        rank: int | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, expand=expand, state=state, conv=conv, rank=rank, causal=causal)
        if first not in ("space", "time"):
            raise ValueError(f'first is "space", frame after frame, or "time", pixel after pixel; got {first!r}')
        self.first = first

    def check(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> None:
        super().check(x, context, layout, padding)
        require_grid(self.row.name, layout, 3)

    def orders(self, layout: Layout) -> Sequence[Order]:
        assert isinstance(layout, Grid)
        space, time, *backwards = spatio_temporal(layout)
        return (space, backwards[0]) if self.first == "space" else (time, backwards[1])
