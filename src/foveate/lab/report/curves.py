"""Curves of figures against what they cost, each named once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foveate.lab.compare.words import percent, round_percent
from foveate.lab.report.markup import Markup, join, tag
from foveate.lab.report.svg import Frame, Scale, Tick, drawing, line, one_two_five, symlog, text, x_axis, y_axis
from foveate.lab.report.svg_labels import place, shortened

ONE_PER_MILLE = 0.001
LOSSES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Dot:
    """A point of a curve: a cost, a change of a loss, and what is said of it."""

    x: float
    y: float
    said: str


@dataclass(frozen=True)
class Curve:
    """Points of one method; ``role`` and ``key`` are those of style sheets (see plots.py)."""

    name: str
    key: int
    role: str
    dots: tuple[Dot, ...]


def losses(curves: Sequence[Curve], start: float, end: float) -> Scale:
    """Changes of a loss downwards, nearly linear below one per mille."""
    values = [dot.y for curve in curves for dot in curve.dots]
    worst, best = max([*values, 0.01]), min([*values, 0.0])
    return Scale(min(best * 1.6, -ONE_PER_MILLE), worst * 2, start, end, symlog(ONE_PER_MILLE))


def loss_ticks(y: Scale) -> list[Tick]:
    values = [0.0, *LOSSES[::-1], *(-loss for loss in LOSSES[::-1])]
    return [(value, round_percent(value, sign=True)) for value in values if y.holds(value)]


def apart(ticks: Sequence[Tick], scale: Scale, room: float = 15.0) -> list[Tick]:
    """Those ticks, the first ones first, that stand at least so many pixels from one another."""
    kept: list[Tick] = []
    for tick in ticks:
        if all(abs(scale(tick[0]) - scale(other[0])) >= room for other in kept):
            kept.append(tick)
    return kept


def on_front(curves: Sequence[Curve]) -> set[Dot]:
    """Points that no other beats in both cost and loss."""
    kept: list[Dot] = []
    for dot in sorted((dot for curve in curves for dot in curve.dots), key=lambda dot: (dot.x, dot.y)):
        if not kept or dot.y < kept[-1].y:
            kept.append(dot)
    return set(kept)


def loss_plot(
    curves: Sequence[Curve], width: int, height: int, *, title: str, loss: str, said: Callable[[float], str]
) -> Markup:
    """Losses, downwards, against a cost on a logarithmic axis; ``said`` writes a cost."""
    frame = Frame(58, 34, width - 14, height - 48)
    costs = [dot.x for curve in curves for dot in curve.dots]
    x = Scale(min(costs) * 0.8, max(costs) * 1.25, frame.left, frame.right, math.log10)
    y = losses(curves, frame.top, frame.bottom)
    ticks = one_two_five(x.low, x.high)
    ticks = ticks if len(ticks) <= width // 90 else [value for value in ticks if f"{value:e}".startswith("1.0")]
    named = sorted(curves, key=lambda curve: ("chosen", "exact", "front", "other").index(curve.role))
    best = [min(curve.dots, key=lambda dot: (dot.y, dot.x)) for curve in named]
    points = [(x(dot.x), y(dot.y)) for dot in best]
    labels = place(points, [shortened(curve.name, width // 24) for curve in named], frame)
    front = on_front(curves)
    steps = [(x(dot.x), y(dot.y)) for dot in sorted(front, key=lambda dot: dot.x)]
    marks = []
    for curve, at, label in zip(named, points, labels, strict=True):
        near = (min(max(at[0], label.box.left), label.box.right), min(max(at[1], label.box.top), label.box.bottom))
        marks.append(
            tag(
                "g",
                line([(x(dot.x), y(dot.y)) for dot in curve.dots], "curve") if len(curve.dots) > 1 else None,
                *(_circle(dot, x, y, small=dot not in front) for dot in curve.dots),
                line([at, near], "leader") if label.needs_line else None,
                text(label.box.left, label.box.bottom - 3, label.said, class_="name"),
                class_=f"mark {curve.role} k{curve.key}",
            )
        )
    return drawing(
        width,
        height,
        x_axis(frame, x, [(value, said(value)) for value in ticks], title),
        y_axis(frame, y, loss_ticks(y), f"↑ change in {loss}"),
        line(steps, "pareto") if len(steps) > 1 else None,
        *reversed(marks),
        label=f"Change in {loss} against {title}, one curve for each method",
    )


def _circle(dot: Dot, x: Scale, y: Scale, *, small: bool) -> Markup:
    return tag("circle", tag("title", dot.said), cx=x(dot.x), cy=y(dot.y), r=3.0 if small else 5.0)


def panel(curve: Curve, y: Scale, width: int, height: int, option: str) -> Markup:
    """One method's losses against the values of its budget, on the scale that all panels share."""
    frame = Frame(46, 12, width - 8, height - 34)
    own = Scale(y.low, y.high, frame.top, frame.bottom, y.transform)
    values = [dot.x for dot in curve.dots]
    far = min(values) > 0 and max(values) / min(values) > 4
    low, high = min(values), max(values)
    room = 1.0 if low == high else 0.0
    x = Scale(low - room, high + room, frame.left + 10, frame.right - 10, math.log2 if far else float)
    points = [(x(dot.x), own(dot.y)) for dot in curve.dots]
    ends = [(low, f"{low:g}"), (high, f"{high:g}")] if low != high else [(low, f"{low:g}")]
    drawn = tag(
        "g",
        line(points, "curve") if len(points) > 1 else None,
        *(_circle(dot, x, own, small=True) for dot in curve.dots),
        class_=f"mark {curve.role} k{curve.key}",
    )
    ticks = apart(loss_ticks(own), own)
    grid = [tag("path", d=f"M{frame.left} {own(at):.1f}H{frame.right}", class_="grid") for at, _ in ticks]
    said = [text(frame.left - 6, own(at) + 4, word, anchor="end", class_="tick") for at, word in ticks]
    marks = [text(x(at), frame.bottom + 14, word, anchor="middle", class_="tick") for at, word in ends]
    name = text(frame.left + frame.width / 2, frame.bottom + 28, option, anchor="middle", class_="axis")
    best = percent(min(dot.y for dot in curve.dots), sign=True)
    return drawing(width, height, *grid, *said, *marks, name, drawn, label=f"{curve.name}: at best {best}")


def in_two_sizes(plot: Callable[[int, int], Markup]) -> Markup:
    """A plot for screens and one for phones; style sheets show one of them."""
    return join(tag("div", plot(920, 480), class_="wide"), tag("div", plot(380, 480), class_="narrow"))
