"""Just enough of a plotting library: scales, axes and shapes as SVG that style sheets can colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foveate.lab.report.markup import Child, Markup, tag

Transform = Callable[[float], float]
Tick = tuple[float, str]


@dataclass(frozen=True)
class Scale:
    """Values between ``low`` and ``high`` on pixels between ``start`` and ``end``, after a transform.

    >>> Scale(1, 100, 0, 200, math.log10)(10)
    100.0
    """

    low: float
    high: float
    start: float
    end: float
    transform: Transform = float

    def __call__(self, value: float) -> float:
        low, high = self.transform(self.low), self.transform(self.high)
        share = (self.transform(value) - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def inside(self, value: float) -> float:
        """The pixel of a value, or of the end of the scale that is nearest to it."""
        return self(min(max(value, self.low), self.high))


def symlog(threshold: float) -> Transform:
    """Nearly linear below the threshold, logarithmic above it, odd.

    >>> symlog(1.0)(9.0), symlog(1.0)(-9.0)
    (1.0, -1.0)
    """
    return lambda value: math.copysign(math.log10(1 + abs(value) / threshold), value)


def one_two_five(low: float, high: float) -> list[float]:
    """Round values 1, 2 and 5 times a power of ten in a range.

    >>> one_two_five(0.15, 6)
    [0.2, 0.5, 1.0, 2.0, 5.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [round(factor * 10.0**power, 12) for power in powers for factor in (1, 2, 5)]
    return [value for value in values if low <= value <= high]


@dataclass(frozen=True)
class Frame:
    """The inside of a plot: where its axes run."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top


def drawing(width: float, height: float, *children: Child, label: str, class_: str = "") -> Markup:
    """A picture of this size that a reader of screens hears as ``label``."""
    return tag(
        "svg",
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=label,
        class_=class_ or None,
        style=f"max-width:{width:g}px",
    )


def x_axis(frame: Frame, scale: Scale, ticks: Sequence[Tick], title: str) -> Markup:
    """Vertical hair lines with their values below, and what they mean under them."""
    lines = [tag("path", d=f"M{scale(at):.1f} {frame.top}V{frame.bottom}", class_="grid") for at, _ in ticks]
    values = [text(scale(at), frame.bottom + 18, said, anchor="middle", class_="tick") for at, said in ticks]
    name = text(frame.left + frame.width / 2, frame.bottom + 38, title, anchor="middle", class_="axis")
    return tag("g", *lines, *values, name)


def y_axis(frame: Frame, scale: Scale, ticks: Sequence[Tick], title: str) -> Markup:
    """Horizontal hair lines with their values at the left, and what they mean above."""
    lines = [tag("path", d=f"M{frame.left} {scale(at):.1f}H{frame.right}", class_="grid") for at, _ in ticks]
    values = [text(frame.left - 8, scale(at) + 4, said, anchor="end", class_="tick") for at, said in ticks]
    return tag("g", *lines, *values, text(4, frame.top - 14, title, class_="axis"))


def text(x: float, y: float, said: str, *, anchor: str | None = None, class_: str | None = None) -> Markup:
    return tag("text", said, x=float(x), y=float(y), text_anchor=anchor, class_=class_)


def line(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """Straight lines from point to point."""
    return tag("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), class_=class_)
