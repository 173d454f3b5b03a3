"""Labels beside points, none over another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from foveate.lab.report.svg import Frame

CHARACTER = 6.65  # width and height of a character of the labels' monospaced type, in pixels
LINE = 13.0
GAP = 9.0  # from a point to its label
DOT, NEAR = 5.0, 13.0  # how far a label keeps from its own point and from others
DISTANCES = (GAP, *(GAP + 10.0 * step for step in range(1, 24)))
DIRECTIONS = [math.tau * turn / 16 for turn in (0, 15, 1, 8, 7, 9, 14, 2, 12, 4, 10, 6, 13, 3, 11, 5)]


class Box(NamedTuple):
    """A rectangle, edges in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def inside(self, frame: Frame) -> bool:
        return (
            self.left >= frame.left
            and self.right <= frame.right
            and self.top >= frame.top
            and self.bottom <= frame.bottom
        )


class Label(NamedTuple):
    """A text, its box, and whether it stands so far off that a line must lead to it."""

    said: str
    box: Box
    needs_line: bool


def shortened(said: str, most: int) -> str:
    """At most so many characters.

    >>> shortened("window(512)", 8)
    'window(…'
    """
    return said if len(said) <= most else said[: most - 1] + "…"


def place(
    points: Sequence[tuple[float, float]], said: Sequence[str], frame: Frame, obstacles: Sequence[Box] = ()
) -> list[Label]:
    """A label for each point, as near as can be: inside the frame, off obstacles and other labels, and so far
    from other points that nobody takes it for theirs.

    Points that come first choose first. A label for which there is no room is left without text.
    """
    placed: list[Label] = []
    for at, name in zip(points, said, strict=True):
        others = [_around(point, NEAR) for point in points if point != at]
        taken = [_around(at, DOT), *others, *obstacles, *(label.box for label in placed if label.said)]
        placed.append(_place_one(*at, name, frame, taken))
    return placed


def _around(point: tuple[float, float], radius: float) -> Box:
    return Box(point[0] - radius, point[1] - radius, point[0] + radius, point[1] + radius)


def _place_one(x: float, y: float, said: str, frame: Frame, taken: list[Box]) -> Label:
    for distance in DISTANCES:
        for direction in DIRECTIONS:
            box = _box(x, y, said, distance, direction)
            if box.inside(frame) and not any(box.meets(other) for other in taken):
                return Label(said, box, needs_line=distance > GAP)
    return Label("", Box(x, y, x, y), needs_line=False)


def _box(x: float, y: float, said: str, distance: float, direction: float) -> Box:
    """The label's box when its nearest point lies that far off in that direction."""
    width, across, down = CHARACTER * len(said), math.cos(direction), math.sin(direction)
    left = x + across * distance - width * (1 - across) / 2
    middle = y + down * (distance + LINE / 2)
    return Box(left, middle - LINE / 2, left + width, middle + LINE / 2)


def spread(heights: Sequence[float], low: float, high: float, gap: float = LINE) -> list[float]:
    """Heights moved as little as can be told apart, at least ``gap`` from one another, between low and high.

    >>> spread([10.0, 11.0, 40.0], 0, 100, gap=10)
    [5.5, 15.5, 40.0]
    """
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    gap = min(gap, (high - low) / max(1, len(heights) - 1))
    pools: list[tuple[float, int]] = []  # neighbours that would overlap stand together around their mean
    for rank, index in enumerate(order):
        mean, count = heights[index] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            other, size = pools.pop()
            mean, count = (mean * count + other * size) / (count + size), count + size
        pools.append((mean, count))
    levels = [mean for mean, count in pools for _ in range(count)]
    most = high - gap * (len(heights) - 1)
    found = [0.0] * len(heights)
    for rank, (index, level) in enumerate(zip(order, levels, strict=True)):
        found[index] = min(max(level, low), most) + rank * gap
    return found
