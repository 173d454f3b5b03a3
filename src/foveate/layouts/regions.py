"""Regions: boxes of equal sides that tile a grid, those at the far border cut short."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from foveate.layouts.kinds import Grid, patch_slots
from foveate.plain import remembered
from foveate.precision import to_accum


@dataclass(frozen=True, eq=False)
class Regions:
    """A grid read region by region: R regions of L slots each, empty (-1) where one hangs over the border.

    >>> regions = regions_of(Grid(2, 3), (2, 2))
    >>> regions.slots
    tensor([[ 0,  1,  3,  4],
            [ 2, -1,  5, -1]])
    >>> x = torch.randn(1, 1, 6, 8)
    >>> torch.equal(regions.join(regions.split(x)), x)
    True
    """

    slots: Tensor  # (R, L)
    dims: tuple[int, ...]  # regions along each axis

    @property
    def count(self) -> int:
        return self.slots.shape[0]

    @property
    def size(self) -> int:
        """Slots of a region."""
        return self.slots.shape[1]

    @cached_property
    def holds(self) -> Tensor:
        """Whether each slot (R * L,) holds a token."""
        return self.slots.flatten() >= 0

    @cached_property
    def is_whole(self) -> bool:
        return bool(self.holds.all())

    @cached_property
    def tokens(self) -> Tensor:
        """How many tokens each region has, (R,)."""
        return (self.slots >= 0).sum(1)

    @cached_property
    def slot_of(self) -> Tensor:
        """Slot of each token, (N,)."""
        places = torch.nonzero(self.holds).squeeze(1)
        found = torch.empty_like(places)
        found[self.slots.flatten()[places]] = places
        return found

    @cached_property
    def region_of(self) -> Tensor:
        """Region of each token, (N,)."""
        return self.slot_of // self.size

    def split(self, x: Tensor) -> Tensor:
        """Tokens (..., N, D) region by region, (..., R * L, D), zeros at empty slots."""
        slots = self.slots.flatten().to(x.device)
        found = x.index_select(-2, slots.clamp_min(0))
        return found if self.is_whole else found.masked_fill((slots < 0).unsqueeze(1), 0)

    def join(self, y: Tensor) -> Tensor:
        """What stands at slots (..., R * L, D) back at its tokens, (..., N, D)."""
        return y.index_select(-2, self.slot_of.to(y.device))

    def means(self, split: Tensor) -> Tensor:
        """Mean token of each region, (..., R, D), of tokens split; arithmetic is at least float32."""
        sums = to_accum(split).unflatten(-2, (self.count, self.size)).sum(-2)
        return sums / self.tokens.to(sums).unsqueeze(1)


def regions_of(grid: Grid, sides: tuple[int, ...]) -> Regions:
    """The regions of a grid whose sides are so long; ValueError unless there is a side of at least 1 for each axis."""
    if len(sides) != grid.num_axes or min(sides) < 1:
        raise ValueError(f"regions of {grid} have {grid.num_axes} sides of at least 1; got {sides}")
    return _regions(grid.dims, sides)


@remembered(64)
def _regions(dims: tuple[int, ...], sides: tuple[int, ...]) -> Regions:
    inside = tuple(min(side, size) for side, size in zip(sides, dims, strict=True))
    counts = tuple(-(-size // side) for size, side in zip(dims, inside, strict=True))
    size = 1
    for side in inside:
        size *= side
    return Regions(patch_slots(dims, inside).view(-1, size), counts)
