"""VideoMamba: videos scanned forwards and backwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Unpack

from foveate.catalogue.registry import register
from foveate.layouts.orders import (
    Order,
    spatio_temporal,
)
from foveate.mixers.recurrent_ssm.audio_mamba import BidirectionalMamba
from foveate.mixers.recurrent_ssm.mamba import MambaOptions
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

    grid_axes = (3,)

    def __init__(self, dim: int, *, first: str = "space", **options: Unpack[MambaOptions]) -> None:
        super().__init__(dim, **options)
        if first not in ("space", "time"):
            raise ValueError(f'first is "space", frame after frame, or "time", pixel after pixel; got {first!r}')
        self.first = first

    def orders(self, layout: Layout) -> Sequence[Order]:
        assert isinstance(layout, Grid)
        space, time, *backwards = spatio_temporal(layout)
        return (space, backwards[0]) if self.first == "space" else (time, backwards[1])
