"""Static patterns on grids. Each is a rule per axis; a pair is visible where the rule of every axis holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.layouts.kinds import Grid, Layout
from foveate.patterns.algebra import Bounds, Boxes, Index, Interval, Pattern, Scene, mix_hash
from foveate.patterns.rules.axes import AxisRule, Near, SameRegion, SlidingTiles, Whole
from foveate.patterns.rules.beside import Beside
from foveate.patterns.rules.per_axis import check_equal_axes, flags, is_whole, pairs, per_axis, spread


@dataclass(frozen=True, eq=False, repr=False)
class OnGrid(Pattern):
    """A grid pattern; `grid` is None until it is resolved."""

    grid: Grid | Beside | None = dataclasses.field(default=None, kw_only=True)
    needs_axes = True

    def rules(self, dims: tuple[int, ...]) -> tuple[AxisRule, ...]:
        """One rule for each axis of a grid of these sizes; ValueError in words where it does not fit."""
        raise NotImplementedError

    def resolve(self, scene: Scene) -> Pattern:
        require_layout(self, scene, (Grid, Beside), "Grid(height, width)")
        assert isinstance(scene.layout, (Grid, Beside))
        place = dataclasses.replace(self, grid=scene.layout)
        place.placed()
        return place

    def placed(self) -> tuple[Beside, tuple[AxisRule, ...]]:
        """The grid, with no token beside it or some, and the rules."""
        if self.grid is None:
            raise ValueError(f"{self} lives on a grid: pass layout=Grid(height, width) and resolve it first")
        place = Beside(self.grid) if isinstance(self.grid, Grid) else self.grid
        return place, self.rules(place.grid.dims)

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        place, rules = self.placed()
        coordinates = zip(rules, place.coordinates(q), place.coordinates(k), strict=True)
        seen = reduce(and_, (rule.visible(at_q, at_k) for rule, at_q, at_k in coordinates))
        if isinstance(self.grid, Grid):
            return seen
        return torch.where(place.holds(q) & place.holds(k), seen, place.others)

    def bounds(self, boxes: Boxes) -> Bounds:
        place, rules = self.placed()
        parts = [rule.bounds(at) for rule, at in zip(rules, boxes.axes, strict=True)]
        some, every = (torch.stack(flags).all(0) for flags in zip(*parts, strict=True))
        if isinstance(self.grid, Grid):
            return Bounds(some, every)
        touches, apart = _beside(place, boxes.position)
        if place.others:
            return Bounds(some | touches, every | apart)
        return Bounds(some & ~apart, every & ~touches)

    def signature(self, boxes: Boxes) -> Tensor:
        """By rule along each axis; where a tile wraps round a row, only the first axis may be shifted."""
        own = self._among_grid(boxes)
        if isinstance(self.grid, Grid):
            return own
        place, _ = self.placed()
        at = boxes.position
        return torch.where(_beside(place, at).touches, mix_hash(at.q_lo, at.k_lo), own)

    def _among_grid(self, boxes: Boxes) -> Tensor:
        place, rules = self.placed()
        straight = _is_box(place, boxes)
        starts = zip(place.coordinates(boxes.position.q_lo), place.coordinates(boxes.position.k_lo), strict=True)
        signatures = [straight.long()]
        for axis, (rule, (q, k)) in enumerate(zip(rules, starts, strict=True)):
            own = rule.signature(q, k, boxes.axes[axis])
            signatures.append(own if axis == 0 else torch.where(straight, own, mix_hash(q, k)))
        return mix_hash(*signatures)


class Others(NamedTuple):
    """Of each box of pairs: has some pair, or has every pair, a token beside the grid."""

    touches: Tensor
    apart: Tensor


def _beside(place: Beside, at: Interval) -> Others:
    low, high = place.before, place.end
    touches = (torch.minimum(at.q_lo, at.k_lo) < low) | (torch.maximum(at.q_hi, at.k_hi) >= high)
    apart = (torch.minimum(at.q_hi, at.k_hi) < low) | (torch.maximum(at.q_lo, at.k_lo) >= high)
    return Others(touches, apart)


def require_layout(pattern: Pattern, scene: Scene, kind: type[Layout] | tuple[type[Layout], ...], example: str) -> None:
    """Refuse a scene whose layout is not of this kind, or whose queries are not all among the keys."""
    if not isinstance(scene.layout, kind):
        raise ValueError(f"{pattern} needs layout={example}; got {scene.layout}")
    if scene.num_queries > scene.num_keys:
        raise ValueError(
            f"{pattern} takes queries that are among its keys; got {scene.num_queries} queries for"
            f" {scene.num_keys} keys"
        )


def _is_box(place: Beside, boxes: Boxes) -> Tensor:
    """Whether queries and keys each fill a box of the grid, rather than wrap round the end of a row."""
    corners = Interval(*(place.grid.positions(edges) + place.before for edges in zip(*boxes.axes, strict=True)))
    matches = [corner == edge for corner, edge in zip(corners, boxes.position, strict=True)]
    return torch.stack(matches).all(0)


@dataclass(frozen=True, eq=False, repr=False)
class Neighborhood(OnGrid):
    kernel: int | tuple[int, ...]
    dilation: int | tuple[int, ...]
    stride: int | tuple[int, ...]
    causal: bool | tuple[bool, ...]
    clamp: bool | tuple[bool, ...] = True

    @property
    def text(self) -> str:  # type: ignore[override]
        settings = [str(self.kernel)]
        for name, default in (("dilation", 1), ("stride", 1), ("causal", False), ("clamp", True)):
            value = getattr(self, name)
            if value != default:
                settings.append(f"{name}={value}")
        return f"neighborhood({', '.join(settings)})"

    @property
    def sees_future(self) -> bool:  # type: ignore[override]
        return not (all(self.causal) if isinstance(self.causal, tuple) else self.causal)

    def rules(self, dims: tuple[int, ...]) -> tuple[AxisRule, ...]:
        settings = (self.kernel, self.dilation, self.stride, self.causal, self.clamp)
        columns = (spread(self, setting, dims) for setting in settings)
        rules = tuple(Near(*axis) for axis in zip(dims, *columns, strict=True))
        for rule in rules:
            if rule.kernel * rule.dilation > rule.size and rule.clamp:
                raise ValueError(
                    f"{self} spans {rule.kernel} x {rule.dilation} tokens, more than an axis of"
                    f" {Grid(*dims)}: kernel * dilation may be at most {rule.size}"
                )
        return rules


def neighborhood(
    kernel: int | tuple[int, ...],
    *,
    dilation: int | tuple[int, ...] = 1,
    stride: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    clamp: bool | tuple[bool, ...] = True,
) -> Pattern:
    """The ``kernel`` nearest keys along each axis of a grid, shifted inward at the borders.

    Every query sees exactly ``kernel`` keys along each axis that is not causal. Each argument is one value,
    or one for each axis. ``dilation`` splits an axis into interleaved groups that see only themselves.
    ``stride`` lets so many neighbouring queries share the window of one of them. Along a ``causal`` axis a
    query sees the last ``kernel`` keys up to its own coordinate, fewer at the border. Without ``clamp`` the
    window is not shifted inward: it stays centred, and a query near the border sees fewer keys, as in a
    convolution with zero padding.

    Hassani et al., Neighborhood Attention Transformer, arXiv 2204.07143; Hassani and Shi, Dilated
    Neighborhood Attention Transformer, arXiv 2209.15001; Hassani et al., Generalized Neighborhood Attention,
    arXiv 2504.16922, whose semantics it follows exactly.

    >>> from foveate import Grid
    >>> neighborhood(3).mask(5, layout=Grid(5))[0, 0].int()
    tensor([[1, 1, 1, 0, 0],
            [1, 1, 1, 0, 0],
            [0, 1, 1, 1, 0],
            [0, 0, 1, 1, 1],
            [0, 0, 1, 1, 1]], dtype=torch.int32)

    Raises ValueError for a kernel below 2, a stride above the kernel, and, once the grid is known, where
    ``kernel * dilation`` exceeds an axis that is clamped, or the number of axes differs.
    """
    kernel = per_axis("neighborhood", "kernel", kernel, least=2)
    dilation = per_axis("neighborhood", "dilation", dilation)
    stride = per_axis("neighborhood", "stride", stride)
    causal, clamp = flags("neighborhood", "causal", causal), flags("neighborhood", "clamp", clamp)
    check_equal_axes("neighborhood", kernel, dilation, stride, causal, clamp)
    if any(step > width for width, step in pairs(kernel, stride)):
        raise ValueError(f"neighborhood takes a stride of at most its kernel {kernel}; got {stride}")
    return Neighborhood(kernel, dilation, stride, causal, clamp)


@dataclass(frozen=True, eq=False, repr=False)
class SlidingTileWindow(OnGrid):
    tile: int | tuple[int, ...]
    window: int | tuple[int, ...]

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"sta({self.tile}, {self.window})"

    def rules(self, dims: tuple[int, ...]) -> tuple[AxisRule, ...]:
        tiles, counts = spread(self, self.tile, dims), spread(self, self.window, dims)
        rules = tuple(SlidingTiles(*axis) for axis in zip(dims, tiles, counts, strict=True))
        for rule in rules:
            if rule.count > rule.num_tiles:
                raise ValueError(
                    f"{self} shows {rule.count} tiles of {rule.tile} tokens, but an axis of {Grid(*dims)} has"
                    f" {rule.num_tiles}"
                )
        return rules


def sta(tile: int | tuple[int, ...], window: int | tuple[int, ...]) -> Pattern:
    """Sliding tile attention: all queries of a tile see the same ``window`` tiles around it, whole ones.

    Both arguments are one value, or one for each axis: the tokens of a tile, and how many tiles a query sees,
    its own included. The window is shifted inward at the borders, so that it always shows as many; of an even
    count one more lies before the query's tile than after it, as in :func:`neighborhood`. The last tile of an
    axis may be short. Zhang et al., Fast Video Generation with Sliding Tile Attention, arXiv 2502.04507.

    >>> from foveate import Grid
    >>> sta(2, 2).mask(6, layout=Grid(6))[0, 0].int()
    tensor([[1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 1],
            [0, 0, 1, 1, 1, 1]], dtype=torch.int32)

    Raises ValueError for a tile or window below 1, and, once the grid is known, where an axis has fewer tiles
    than the window.
    """
    tile, window = per_axis("sta", "tile", tile), per_axis("sta", "window", window)
    check_equal_axes("sta", tile, window)
    return SlidingTileWindow(tile, window)


@dataclass(frozen=True, eq=False, repr=False)
class WindowPartition(OnGrid):
    window: int | tuple[int, ...]
    shift: int | tuple[int, ...]

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"window_partition({self.window}{f', shift={self.shift}' if self.shift != 0 else ''})"

    def rules(self, dims: tuple[int, ...]) -> tuple[AxisRule, ...]:
        windows, shifts = spread(self, self.window, dims), spread(self, self.shift, dims)
        return tuple(SameRegion(*axis) for axis in zip(windows, shifts, strict=True))


def window_partition(window: int | tuple[int, ...], shift: int | tuple[int, ...] = 0) -> Pattern:
    """Keys of the query's own window, where windows of size ``window`` tile the grid from ``shift`` on.

    With a shift this is Swin's shifted-window attention: what its cyclic shift brings together from opposite
    borders stays apart. Both arguments are one value, or one for each axis.

    Liu et al., Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, arXiv 2103.14030.

    >>> from foveate import Grid
    >>> window_partition(2, shift=1).mask(4, layout=Grid(4))[0, 0].int()
    tensor([[1, 0, 0, 0],
            [0, 1, 1, 0],
            [0, 1, 1, 0],
            [0, 0, 0, 1]], dtype=torch.int32)

    Raises ValueError for a window below 1, or a shift that is negative or not below the window.
    """
    window = per_axis("window_partition", "window", window)
    shift = per_axis("window_partition", "shift", shift, least=0)
    check_equal_axes("window_partition", window, shift)
    if any(step >= width for width, step in pairs(window, shift)):
        raise ValueError(f"window_partition takes a shift below its window {window}; got {shift}")
    return WindowPartition(window, shift)


@dataclass(frozen=True, eq=False, repr=False)
class Strips(OnGrid):
    width: int
    axis: int

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"strips({self.width}{f', axis={self.axis}' if self.axis else ''})"

    def rules(self, dims: tuple[int, ...]) -> tuple[AxisRule, ...]:
        if self.axis >= len(dims):
            raise ValueError(f"{self} names axis {self.axis}, but {Grid(*dims)} has axes 0 to {len(dims) - 1}")
        return tuple(SameRegion(self.width, 0) if axis == self.axis else Whole() for axis in range(len(dims)))


def strips(width: int, axis: int = 0) -> Pattern:
    """Keys in the query's own strip, ``width`` tokens wide along ``axis`` and as long as the grid otherwise.

    With heads split between ``strips(w, axis=0)`` and ``strips(w, axis=1)`` it is cross-shaped window
    attention: Dong et al., CSWin Transformer, arXiv 2107.00652.

    >>> from foveate import Grid
    >>> strips(1, axis=1).mask(4, layout=Grid(2, 2))[0, 0].int()
    tensor([[1, 0, 1, 0],
            [0, 1, 0, 1],
            [1, 0, 1, 0],
            [0, 1, 0, 1]], dtype=torch.int32)
    """
    if not is_whole(axis, 0) or axis > 2:
        raise ValueError(f"strips takes axis 0, 1 or 2; got {axis!r}")
    if not is_whole(width, 1):
        raise ValueError(f"strips takes a whole width of at least 1; got {width!r}")
    return Strips(width, axis)
