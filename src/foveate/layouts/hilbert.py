"""The generalised Hilbert curve: a path through boxes of any sides; what is near along it is near in space."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from foveate.layouts.kinds import Grid
from foveate.layouts.orders import Order
from foveate.plain import remembered


class Vector(NamedTuple):
    """A step, or a side of a box, along three axes."""

    x: int
    y: int
    z: int

    def plus(self, *others: Vector) -> Vector:
        return Vector(*(sum(parts) for parts in zip(self, *others, strict=True)))

    def minus(self, other: Vector) -> Vector:
        return self.plus(other.turned)

    @property
    def turned(self) -> Vector:
        return Vector(-self.x, -self.y, -self.z)

    @property
    def length(self) -> int:
        return abs(self.x + self.y + self.z)  # sides lie along one axis each

    @property
    def unit(self) -> Vector:
        return Vector(*((part > 0) - (part < 0) for part in self))

    @property
    def half(self) -> Vector:
        """About half of it, an even number of steps where it is longer than two, which keeps paths without jumps."""
        steps = self.length // 2
        steps += steps % 2 if self.length > 2 else 0
        return Vector(*(part * steps for part in self.unit))


@remembered(64)
def hilbert(grid: Grid) -> Order:
    """Tokens of a grid along the generalised Hilbert curve, which takes sides of any length.

    Each token is a neighbour of the last, but for a few steps across a corner where sides are odd. After Červený's
    gilbert, by which Jenga (arXiv 2505.16864) orders the tokens of a video.

    >>> hilbert(Grid(2, 4)).index
    tensor([0, 4, 5, 1, 2, 6, 7, 3])
    """
    dims = (1,) * (3 - grid.num_axes) + grid.dims
    sides = sorted((Vector(*(size * (axis == at) for at in range(3))) for axis, size in enumerate(dims)), key=_longest)
    cells = torch.tensor(list(_path(Vector(0, 0, 0), *sides)), device="cpu").unbind(1)
    return Order(Grid(*dims).positions(cells))


def _longest(side: Vector) -> int:
    return -side.length


def _path(at: Vector, a: Vector, b: Vector, c: Vector) -> Iterator[Vector]:
    """Cells of the box of sides a, b, c at a corner, from there to the corner at the end of a."""
    for along in (a, b, c):
        if a.length * b.length * c.length == along.length:  # a row of cells
            for step in range(along.length):
                yield at.plus(Vector(*(part * step for part in along.unit)))
            return
    for corner, sides in _parts(at, a, b, c):
        yield from _path(corner, *sides)


def _parts(at: Vector, a: Vector, b: Vector, c: Vector) -> list[tuple[Vector, tuple[Vector, Vector, Vector]]]:
    """The boxes that a box is cut into, each from the corner where the path enters it."""
    p, q, r = a.half, b.half, c.half
    last = at.plus(a.minus(a.unit))  # the cell where the path ends
    if 2 * a.length > 3 * max(b.length, c.length):  # long: two halves of a
        return [(at, (p, b, c)), (at.plus(p), (a.minus(p), b, c))]
    if 3 * b.length > 4 * c.length:  # flat: c is not cut
        end = last.plus(q.minus(b.unit))
        return [(at, (q, c, p)), (at.plus(q), (a, b.minus(q), c)), (end, (q.turned, c, p.minus(a)))]
    if 3 * c.length > 4 * b.length:  # narrow: b is not cut
        end = last.plus(r.minus(c.unit))
        return [(at, (r, p, b)), (at.plus(r), (a, b, c.minus(r))), (end, (r.turned, p.minus(a), b))]
    far, turn = c.minus(c.unit), q.minus(b.unit)
    return [
        (at, (q, r, p)),
        (at.plus(q), (c, p, b.minus(q))),
        (at.plus(turn, far), (a, q.turned, r.minus(c))),
        (last.plus(q, far), (c.turned, p.minus(a), b.minus(q))),
        (last.plus(turn), (q.turned, r, p.minus(a))),
    ]
