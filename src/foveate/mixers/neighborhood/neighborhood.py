"""Local attention on grids of two or three axes."""

from __future__ import annotations

from typing import Any, ClassVar

from foveate.catalogue.registry import register
from foveate.mixers.grid import GridMixer, Size, sides_of
from foveate.patterns import Grid, Layout, Pattern, neighborhood
from foveate.patterns.rules.grid import Neighborhood


class NeighborhoodMixer(GridMixer):
    """Attention over a neighborhood, which looks ``(kernel - 1) * dilation`` steps along an axis."""

    def reach(self, axes: int) -> tuple[int, ...]:
        pattern = self.core.pattern
        assert isinstance(pattern, Neighborhood)
        pairs = zip(sides_of(pattern.kernel, axes), sides_of(pattern.dilation, axes), strict=True)
        return tuple((side - 1) * gap for side, gap in pairs)


@register(
    "neighborhood_attention",
    papers=("NAT / NATTEN",),
    formula="o_i = Σ_{j ∈ ρ(i)} softmax_j(q_i·k_j / √d + b(i - j)) v_j, ρ(i): the k × k nearest tokens",
    supports={"noncausal", "padding", "grid", "gqa"},
)
class NeighborhoodAttention(NeighborhoodMixer):
    """Attention of each token of a grid to the k × k tokens nearest to it, as many at borders as inside."""

    tiny: ClassVar[dict[str, Any]] = {"kernel": 3}
    grids: ClassVar[tuple[Layout, ...]] = (Grid(8, 7), Grid(7, 9))

    @staticmethod
    def pattern(*, kernel: Size = 7) -> Pattern:
        return neighborhood(kernel)


@register(
    "dilated_neighborhood_attention",
    papers=("DiNAT (DiNA)",),
    formula="o_i = Σ_{j ∈ ρ_δ(i)} softmax_j(q_i·k_j / √d + b(i - j)) v_j, ρ_δ(i): k × k nearest, j ≡ i mod δ",
    supports={"noncausal", "padding", "grid", "gqa"},
)
class DilatedNeighborhoodAttention(NeighborhoodMixer):
    """Neighborhood attention with gaps: the k × k nearest tokens among every δ-th along each axis."""

    tiny: ClassVar[dict[str, Any]] = {"kernel": 3, "dilation": 2}
    grids: ClassVar[tuple[Layout, ...]] = (Grid(15, 14), Grid(14, 17))

    @staticmethod
    def pattern(*, kernel: Size = 7, dilation: Size = 2) -> Pattern:
        return neighborhood(kernel, dilation=dilation)


@register(
    "generalized_neighborhood_attention",
    papers=("GNA",),
    formula="o_i = Σ_{j ∈ ρ(r(i))} softmax_j(q_i·k_j / √d) v_j, r(i): the one that stands for i's group",
    supports={"noncausal", "padding", "grid", "gqa"},
)
class GeneralizedNeighborhoodAttention(NeighborhoodMixer):
    """Neighborhood attention in which groups of queries share one window, from sliding to separate windows.

    ``axis_causal`` lets queries see no later coordinate along an axis, such as time in a video.
    """

    tiny: ClassVar[dict[str, Any]] = {"kernel": 4, "stride": 2}
    grids: ClassVar[tuple[Layout, ...]] = (Grid(8, 9), Grid(4, 5, 6))
    biased: ClassVar[bool] = False

    @staticmethod
    def pattern(
        *, kernel: Size = 8, stride: Size = 4, dilation: Size = 1, axis_causal: bool | tuple[bool, ...] = False
    ) -> Pattern:
        return neighborhood(kernel, dilation=dilation, stride=stride, causal=axis_causal)
