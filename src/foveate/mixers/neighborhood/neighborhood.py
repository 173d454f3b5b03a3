"""Local attention on grids of two or three axes."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from foveate.catalogue.registry import register
from foveate.mixers.core import PatternCore
from foveate.mixers.grid import GridMixer, Size, sides_of
from foveate.patterns import Grid, Layout, neighborhood


def neighborhood_core(*, kernel: Size = 13) -> PatternCore:
    """The ``kernel`` nearest keys along each axis of a grid.

    >>> neighborhood_core(kernel=7).pattern
    neighborhood(7)
    """
    return PatternCore(neighborhood(kernel))


@register(
    "neighborhood_attention",
    papers=("NAT / NATTEN",),
    formula="o_i = Σ_{j ∈ ρ(i)} softmax_j(q_i·k_j / √d + b(i - j)) v_j, ρ(i): the k × k nearest tokens",
    supports={"noncausal", "padding", "grid", "gqa"},
    core=neighborhood_core,
)
class NeighborhoodAttention(GridMixer):
    """Attention of each token of a grid to the k × k tokens nearest to it, as many at borders as inside."""

    tiny: ClassVar[dict[str, Any]] = {"kernel": 3}
    grids: ClassVar[tuple[Layout, ...]] = (Grid(8, 7), Grid(7, 9))

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        kernel: Size = 7,
        axes: int = 2,
        relative_bias: bool = True,
        **options: Any,
    ) -> None:
        sides = sides_of(kernel, axes)
        reach = tuple(side - 1 for side in sides) if relative_bias else None
        super().__init__(dim, heads, pattern=neighborhood(kernel), keys=math.prod(sides), reach=reach, **options)


def dilated_neighborhood_core(*, kernel: Size = 13, dilation: Size = 2) -> PatternCore:
    """The ``kernel`` nearest keys along each axis among those a multiple of ``dilation`` away.

    >>> dilated_neighborhood_core(kernel=7, dilation=4).pattern
    neighborhood(7, dilation=4)
    """
    return PatternCore(neighborhood(kernel, dilation=dilation))


@register(
    "dilated_neighborhood_attention",
    papers=("DiNAT (DiNA)",),
    formula="o_i = Σ_{j ∈ ρ_δ(i)} softmax_j(q_i·k_j / √d + b(i - j)) v_j, ρ_δ(i): k × k nearest, j ≡ i mod δ",
    supports={"noncausal", "padding", "grid", "gqa"},
    core=dilated_neighborhood_core,
)
class DilatedNeighborhoodAttention(GridMixer):
    """Neighborhood attention with gaps: the k × k nearest tokens among every δ-th along each axis."""

    tiny: ClassVar[dict[str, Any]] = {"kernel": 3, "dilation": 2}
    grids: ClassVar[tuple[Layout, ...]] = (Grid(15, 14), Grid(14, 17))

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        kernel: Size = 7,
        dilation: Size = 2,
        axes: int = 2,
        relative_bias: bool = True,
        **options: Any,
    ) -> None:
        sides, gaps = sides_of(kernel, axes), sides_of(dilation, axes)
        reach = tuple((side - 1) * gap for side, gap in zip(sides, gaps, strict=True))
        super().__init__(
            dim,
            heads,
            pattern=neighborhood(kernel, dilation=dilation),
            keys=math.prod(sides),
            reach=reach if relative_bias else None,
            **options,
        )


def generalized_neighborhood_core(
    *, kernel: Size = 16, stride: Size = 8, dilation: Size = 1, axis_causal: bool | tuple[bool, ...] = False
) -> PatternCore:
    """Neighborhoods that ``stride`` neighbouring queries share; at a stride of ``kernel``, separate windows.

    >>> generalized_neighborhood_core(kernel=8, stride=4).pattern
    neighborhood(8, stride=4)
    """
    return PatternCore(neighborhood(kernel, dilation=dilation, stride=stride, causal=axis_causal))


@register(
    "generalized_neighborhood_attention",
    papers=("GNA",),
    formula="o_i = Σ_{j ∈ ρ(r(i))} softmax_j(q_i·k_j / √d) v_j, r(i): the one that stands for i's group",
    supports={"noncausal", "padding", "grid", "gqa"},
    core=generalized_neighborhood_core,
)
class GeneralizedNeighborhoodAttention(GridMixer):
    """Neighborhood attention in which groups of queries share one window, from sliding to separate windows.

    ``axis_causal`` lets queries see no later coordinate along an axis, such as time in a video.
    """

    tiny: ClassVar[dict[str, Any]] = {"kernel": 4, "stride": 2}
    grids: ClassVar[tuple[Layout, ...]] = (Grid(8, 9), Grid(4, 5, 6))

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        kernel: Size = 8,
        stride: Size = 4,
        dilation: Size = 1,
        axis_causal: bool | tuple[bool, ...] = False,
        axes: int = 2,
        relative_bias: bool = False,
        **options: Any,
    ) -> None:
        sides, gaps = sides_of(kernel, axes), sides_of(dilation, axes)
        reach = tuple((side - 1) * gap for side, gap in zip(sides, gaps, strict=True))
        super().__init__(
            dim,
            heads,
            pattern=neighborhood(kernel, dilation=dilation, stride=stride, causal=axis_causal),
            keys=math.prod(sides),
            reach=reach if relative_bias else None,
            **options,
        )
