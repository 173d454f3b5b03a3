"""Pictures of what was learned: accuracy against the bytes of state, and the way there."""

from __future__ import annotations

import math
from typing import Any

from foveate.lab.compare.words import percent, size
from foveate.lab.report.markup import Markup, tag
from foveate.lab.report.svg import Frame, Scale, Tick, line, one_two_five, text, x_axis, y_axis
from foveate.lab.report.svg_labels import CHARACTER, LINE, Box, Label, place, spread
from foveate.lab.tasks.kinds import Task

WIDTH, HEIGHT = 920, 400
COLOURS = ("#2f6f9f", "#c8642a", "#3d8b5a", "#9b4f96", "#b8860b", "#c0395a", "#5a6acf", "#4d8f8f", "#8a6d4b", "#777777")
STYLE = """
svg { background: #fff; font: 11px ui-monospace, monospace; fill: #333 }
.grid { stroke: #e4e4e4; fill: none } .axis { font-weight: 600 } .title { font-size: 14px; font-weight: 600 }
.curve { fill: none; stroke-width: 1.6 } .leader { fill: none; stroke: #aaa; stroke-width: .7 }
"""


def draw(task: Task, results: list[dict[str, Any]]) -> str:
    """One SVG file: where each mixer stands, if there are several, above how each learned.

    >>> from foveate.lab.tasks.kinds import Recall
    >>> curve = [{"step": 10, "length": 32, "accuracy": 0.5}, {"step": 20, "length": 256, "accuracy": 0.9}]
    >>> result = {"mixer": "a & b", "accuracy": 0.9, "state_bytes": 4096, "curve": curve}
    >>> "a &amp; b" in draw(Recall(), [result])
    True
    """
    colours = {result["mixer"]: COLOURS[number % len(COLOURS)] for number, result in enumerate(results)}
    several = len(results) > 1
    top = 30 + HEIGHT * several
    parts = [_standing(results, colours, Frame(58, 66, WIDTH - 20, HEIGHT - 20))] if several else []
    room = 40 + CHARACTER * max((len(result["mixer"]) for result in results), default=0)
    parts.append(_learning(results, colours, Frame(58, top + 36, WIDTH - room, top + HEIGHT - 50)))
    return tag(
        "svg",
        tag("style", Markup(STYLE)),
        text(4, 20, in_words(task), class_="title"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {top + HEIGHT}",
        role="img",
        aria_label=f"Accuracy of mixers on the task {task.name}",
    )


def in_words(task: Task) -> str:
    """A task as a heading.

    >>> from foveate.lab.tasks.kinds import Recall
    >>> in_words(Recall(length=64, pairs=4))
    'recall: length 64, pairs 4, vocab 128'
    """
    shown = [f"{key} {value}" for key, value in vars(task).items() if key != "power"]
    return f"{task.name}: {', '.join(shown)}"


def _standing(results: list[dict[str, Any]], colours: dict[str, str], frame: Frame) -> Markup:
    """Accuracy upwards, bytes of state to the right, fewer being better."""
    bytes_ = [result["state_bytes"] for result in results]
    x = Scale(min(bytes_) / 1.6, max(bytes_) * 1.6, frame.left, frame.right, math.log10)
    y = _accuracies(frame)
    points = [(x(result["state_bytes"]), y(result["accuracy"])) for result in results]
    labels = place(points, [result["mixer"] for result in results], frame_of_labels(frame))
    ticks = [(value, size(round(value))) for value in one_two_five(x.low, x.high)]
    return tag(
        "g",
        x_axis(frame, x, ticks, "state after the whole sequence →"),
        y_axis(frame, y, _shares(), "↑ answers that are right"),
        *(_mark(result, at, label, colours) for result, at, label in zip(results, points, labels, strict=True)),
    )


def frame_of_labels(frame: Frame) -> Frame:
    """Labels may stand a little above a plot, where the best points lie."""
    return Frame(frame.left, frame.top - 16, frame.right, frame.bottom)


def _mark(result: dict[str, Any], at: tuple[float, float], label: Label, colours: dict[str, str]) -> Markup:
    said = f"{result['mixer']}: {percent(result['accuracy'])} right with {size(result['state_bytes'])}"
    return tag(
        "g",
        tag("title", said),
        line([at, _nearest(at, label.box)], "leader") if label.needs_line else None,
        tag("circle", cx=at[0], cy=at[1], r=5.0, fill=colours[result["mixer"]]),
        text(label.box.left, label.box.bottom - 3, label.said),
    )


def _nearest(at: tuple[float, float], box: Box) -> tuple[float, float]:
    return min(max(at[0], box.left), box.right), min(max(at[1], box.top), box.bottom)


def _learning(results: list[dict[str, Any]], colours: dict[str, str], frame: Frame) -> Markup:
    """Accuracy against steps; a curve falls where the curriculum goes on to a greater length."""
    results = [result for result in results if result["curve"]]
    most = max((result["curve"][-1]["step"] for result in results), default=1)
    x, y = Scale(0, most, frame.left, frame.right), _accuracies(frame)
    ends = spread([y(result["curve"][-1]["accuracy"]) for result in results], frame.top, frame.bottom)
    return tag(
        "g",
        x_axis(frame, x, _steps(most), "steps →"),
        y_axis(frame, y, _shares(), "↑ right while learning, at the length learned from at the time"),
        *(_curve(result, x, y, end, frame, colours) for result, end in zip(results, ends, strict=True)),
    )


def _curve(result: dict[str, Any], x: Scale, y: Scale, end: float, frame: Frame, colours: dict[str, str]) -> Markup:
    points = [(x(point["step"]), y(point["accuracy"])) for point in result["curve"]]
    drawn = " L".join(f"{across:.1f} {down:.1f}" for across, down in points)
    return tag(
        "g",
        tag("title", f"{result['mixer']}: {result['curve'][-1]['step']:,} steps"),
        tag("path", d=f"M{drawn}", class_="curve", stroke=colours[result["mixer"]]),
        line([points[-1], (frame.right + 12, end)], "leader"),
        tag("text", result["mixer"], x=frame.right + 16.0, y=end + LINE / 2 - 3, fill=colours[result["mixer"]]),
    )


def _accuracies(frame: Frame) -> Scale:
    return Scale(0.0, 1.0, frame.bottom, frame.top)


def _shares() -> list[Tick]:
    return [(part / 4, f"{25 * part}%") for part in range(5)]


def _steps(most: int) -> list[Tick]:
    """About five round numbers of steps."""
    step = next(value for value in one_two_five(1, 10.0 ** len(str(most))) if most / value <= 6)
    return [(value, f"{value:,}") for value in range(0, most + 1, int(step))]
