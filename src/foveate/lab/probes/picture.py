"""Pictures of findings: curves over one axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from foveate.lab.report.markup import Markup, tag
from foveate.lab.report.svg import Frame, Scale, Tick, Transform, text, x_axis, y_axis

WIDTH, HEIGHT = 640, 360
COLOURS = ("#2f6f9f", "#c8642a", "#3d8b5a", "#9b4f96", "#b8860b", "#c0395a")
STYLE = """
svg { background: #fff; font: 11px ui-monospace, monospace; fill: #333 }
.grid { stroke: #e4e4e4; fill: none } .axis { font-weight: 600 }
"""


class Curve(NamedTuple):
    """Values over places, under a name."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def curves(title: str, drawn: Sequence[Curve], *, x: str, y: str, log: bool = False) -> str:
    """An SVG file of curves, their names beside their ends; both axes are logarithmic where ``log``.

    >>> curves("squares", [Curve("n²", [1.0, 2.0], [1.0, 4.0])], x="n", y="n²").startswith("<svg")
    True
    """
    frame = Frame(76, 54, WIDTH - 150, HEIGHT - 50)
    transform: Transform = math.log10 if log else float
    across = Scale(*ends([curve.x for curve in drawn]), frame.left, frame.right, transform)
    up = Scale(*ends([curve.y for curve in drawn]), frame.bottom, frame.top, transform)
    parts = []
    for number, curve in enumerate(drawn):
        points = [(across(a), up(b)) for a, b in zip(curve.x, curve.y, strict=True)]
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        colour = COLOURS[number % len(COLOURS)]
        parts.append(tag("path", d=path, fill="none", stroke=colour, stroke_width=1.8))
        at = frame.top + 14 * number + 10
        parts += [tag("path", d=f"M{frame.right + 10} {at}h16", stroke=colour, stroke_width=1.8)]
        parts += [text(frame.right + 30, at + 4, curve.name)]
    return tag(
        "svg",
        tag("style", Markup(STYLE)),
        text(4, 20, title, class_="axis"),
        x_axis(frame, across, ticks(across), x),
        y_axis(frame, up, ticks(up), y),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=title,
    )


def ends(many: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The least and the greatest of all values; a little apart where they are one."""
    values = [value for each in many for value in each]
    low, high = min(values), max(values)
    return (low, high) if high > low else (low, low + abs(low) + 1)


def ticks(scale: Scale) -> list[Tick]:
    """The ends of a scale and its middle, in words."""
    low, high = scale.low, scale.high
    middle = math.sqrt(low * high) if scale.transform is math.log10 else (low + high) / 2
    return [(value, f"{value:.3g}") for value in (low, middle, high)]
