"""The report's pictures: quality against speed, time against length, and where each mechanism looks."""

from __future__ import annotations

import math
from collections.abc import Callable

from foveate.lab.compare.results import Entry, Results
from foveate.lab.compare.words import percent, round_percent, seconds
from foveate.lab.report.markup import Markup, join, tag
from foveate.lab.report.svg import Frame, Scale, Tick, drawing, line, one_two_five, symlog, text, x_axis, y_axis
from foveate.lab.report.svg_labels import CHARACTER, LINE, Box, place, shortened, spread

ONE_PER_MILLE = 0.001
LOSSES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
SPEEDS = [2.0**power for power in range(-10, 11)]


def front(results: Results) -> list[Entry]:
    """Entries, fastest first, that no other beats in both speed and loss; exact attention may be one."""
    kept: list[Entry] = []
    for entry in sorted(results.ranked, key=lambda e: (-results.speed(e), e.quality.change)):
        if not kept or entry.quality.change < kept[-1].quality.change:
            kept.append(entry)
    return kept


def role(results: Results, entry: Entry) -> str:
    """The style class of an entry: exact, chosen, front or other."""
    if entry is results.exact:
        return "exact"
    if results.recommendation and entry.name == results.recommendation.name:
        return "chosen"
    return "front" if any(entry is best for best in front(results)) else "other"


def key(results: Results, entry: Entry) -> int:
    """The number by which the parts of the page that show one entry know one another."""
    return next(number for number, other in enumerate([results.exact, *results.entries]) if other is entry)


def by_importance(results: Results) -> list[Entry]:
    """Entries with those first that deserve the best places for their labels."""
    order = ("chosen", "exact", "front", "other")
    return sorted(results.ranked, key=lambda entry: order.index(role(results, entry)))


# ---- quality against speed ---------------------------------------------------------------------------------


def quality_plot(results: Results, width: int, height: int) -> Markup:
    """Speed-up to the right, loss downwards, so that the best is at the top right."""
    frame = Frame(58, 34, width - 12, height - 48)
    x, y = _speed_scale(results, frame), _loss_scale(results, frame)
    entries = by_importance(results)
    points = [(x(results.speed(entry)), y(entry.quality.change)) for entry in entries]
    names = [shortened(entry.name, width // 24) for entry in entries]
    steps = _steps(results, frame, x, y)
    labels = place(points, names, frame, [*map(_along, steps, steps[1:]), _hint_box(results, frame, y)])
    marks = [
        _point(results, entry, at, label_box, said, x, y)
        for entry, at, (said, label_box, _) in zip(entries, points, labels, strict=True)
    ]
    leaders = [
        line([at, _nearest(at, label.box)], f"leader k{key(results, entry)}")
        for entry, at, label in zip(entries, points, labels, strict=True)
        if label.needs_line
    ]
    return drawing(
        width,
        height,
        _allowed(results, frame, y),
        x_axis(frame, x, [(v, f"{v:g}×") for v in SPEEDS if x.holds(v)], "times as fast as exact attention →"),
        y_axis(frame, y, _loss_ticks(y), f"↑ {_lost(results)}"),
        line([(x(1.0), frame.top), (x(1.0), frame.bottom)], "one"),
        line(steps, "pareto"),
        *leaders,
        *reversed(marks),
        label=f"{_lost(results).capitalize()} against speed-up, one point for each mechanism",
    )


def _lost(results: Results) -> str:
    """The axis of losses in words."""
    return "distance from exact" if results.measure.is_distance else f"change in {results.measure.loss}"


def _speed_scale(results: Results, frame: Frame) -> Scale:
    speeds = [results.speed(entry) for entry in results.ranked]
    low, high = min(0.8, *speeds, 1.0), max(1.25, *speeds, 1.0)
    return Scale(low * 0.85, high * 1.2, frame.left, frame.right, math.log2)


def _loss_scale(results: Results, frame: Frame) -> Scale:
    changes = [entry.quality.change for entry in results.ranked]
    worst, best = max([*changes, 2 * results.settings["max_loss"]]), min([*changes, 0.0])
    room = symlog(ONE_PER_MILLE)(worst) * 0.15
    stretch = 10.0**room
    high = (1 + worst / ONE_PER_MILLE) * stretch * ONE_PER_MILLE
    low = min(best * 1.6, -ONE_PER_MILLE)
    return Scale(low, high, frame.top, frame.bottom, symlog(ONE_PER_MILLE))


def _loss_ticks(y: Scale) -> list[Tick]:
    values = [0.0, *LOSSES, *(-loss for loss in LOSSES)]
    return [(value, round_percent(value, sign=True)) for value in values if y.holds(value)]


def _allowed(results: Results, frame: Frame, y: Scale) -> Markup:
    """The band of losses that a recommendation may have."""
    depth = max(0.0, y(results.settings["max_loss"]) - frame.top)
    band = tag("rect", x=frame.left, y=frame.top, width=frame.width, height=depth, class_="allowed")
    box = _hint_box(results, frame, y)
    return join(band, text(box.left + 6, box.bottom - 6, _hint(results), class_="hint"))


def _hint(results: Results) -> str:
    return f"allowed: {round_percent(results.settings['max_loss'])}"


def _hint_box(results: Results, frame: Frame, y: Scale) -> Box:
    below = y(results.settings["max_loss"])
    return Box(frame.left, below - 20, frame.left + CHARACTER * len(_hint(results)) + 12, below)


def _steps(results: Results, frame: Frame, x: Scale, y: Scale) -> list[tuple[float, float]]:
    """Steps along the entries that no other beats: left of and below them is what they beat."""
    steps: list[tuple[float, float]] = []
    for entry in front(results):
        at = (x(results.speed(entry)), y(entry.quality.change))
        steps += [(at[0], steps[-1][1] if steps else frame.bottom), at]
    return [*steps, (frame.left, steps[-1][1])]


def _along(start: tuple[float, float], end: tuple[float, float]) -> Box:
    """The room that an upright or level line takes."""
    return Box(
        min(start[0], end[0]) - 1, min(start[1], end[1]) - 1, max(start[0], end[0]) + 1, max(start[1], end[1]) + 1
    )


def _point(
    results: Results,
    entry: Entry,
    at: tuple[float, float],
    box: tuple[float, float, float, float],
    said: str,
    x: Scale,
    y: Scale,
) -> Markup:
    quality, speed = entry.quality, entry.speedup
    exact = entry is results.exact
    whiskers = (
        None
        if exact
        else join(
            line([(x.inside(speed.low), at[1]), (x.inside(speed.high), at[1])], "whisker"),
            line([(at[0], y.inside(quality.change_low)), (at[0], y.inside(quality.change_high))], "whisker"),
        )
    )
    return tag(
        "g",
        tag(
            "title",
            f"{entry.name}: {results.speed(entry):.2f}× as fast, "
            f"{percent(quality.change, sign=True)} {results.measure.loss}",
        ),
        whiskers,
        tag("circle", cx=at[0], cy=at[1], r=5.5),
        text(box[0], box[3] - 3, said, class_="name"),
        class_=f"mark {role(results, entry)} k{key(results, entry)}",
    )


def _nearest(at: tuple[float, float], box: tuple[float, float, float, float]) -> tuple[float, float]:
    return min(max(at[0], box[0]), box[2]), min(max(at[1], box[1]), box[3])


# ---- time against length -----------------------------------------------------------------------------------


def time_plot(results: Results, width: int, height: int) -> Markup:
    """Prefill time against length, both logarithmic, each line named at its end."""
    most = min(34, width // 24)
    names = {id(entry): shortened(entry.name, most) for entry in results.ranked}
    frame = Frame(64, 34, width - 26 - CHARACTER * max(map(len, names.values())), height - 48)
    lengths = [timing.length for timing in results.exact.timings]
    times = [results.seconds(entry, at) for entry in results.ranked for at in range(len(lengths))]
    x = Scale(lengths[0] * 0.95, lengths[-1] * 1.02, frame.left, frame.right, math.log2)
    y = Scale(min(times) * 0.8, max(times) * 1.25, frame.bottom, frame.top, math.log10)
    entries = by_importance(results)
    ends = spread([y(results.seconds(entry)) for entry in entries], frame.top, frame.bottom)
    curves = [_curve(results, entry, x, y, end, names[id(entry)]) for entry, end in zip(entries, ends, strict=True)]
    return drawing(
        width,
        height,
        x_axis(frame, x, [(n, f"{n:,}") for n in lengths], "tokens →"),
        y_axis(
            frame,
            y,
            [(t, seconds(t)) for t in _few(one_two_five(y.low, y.high))],
            f"↑ time of a {results.measure.passes}",
        ),
        *reversed(curves),
        label="Time of a prefill against its length, one line for each mechanism",
    )


def _few(values: list[float]) -> list[float]:
    """Powers of ten alone where there are more values than lines should be drawn for."""
    return values if len(values) <= 9 else [value for value in values if f"{value:e}".startswith("1.0")]


def _curve(results: Results, entry: Entry, x: Scale, y: Scale, end: float, said: str) -> Markup:
    points = [(x(timing.length), y(results.seconds(entry, at))) for at, timing in enumerate(entry.timings)]
    last = points[-1]
    return tag(
        "g",
        tag("title", f"{entry.name}: {seconds(results.seconds(entry))} for {entry.timings[-1].length:,} tokens"),
        line(points, "curve"),
        *(tag("circle", cx=at, cy=down, r=3.0) for at, down in points),
        line([(last[0] + 5, last[1]), (last[0] + 16, end)], "leader"),
        text(last[0] + 20, end + LINE / 2 - 3, said, class_="name"),
        class_=f"mark {role(results, entry)} k{key(results, entry)}",
    )


# ---- where it looks ----------------------------------------------------------------------------------------


def mask_symbol(entry: Entry, name: str) -> Markup:
    """The picture of a mask, to be drawn wherever it is used: a path for each shade."""
    rows = entry.looked.picture
    shades = [_shade(rows, digit) for digit in "0123456789"]
    size = max(1, len(rows))
    return tag("symbol", *shades, id=name, viewBox=f"0 0 {size} {size}")


def _shade(rows: list[str], digit: str) -> Markup | None:
    runs: list[str] = []
    for down, row in enumerate(rows):
        runs += [f"M{start} {down}h{end - start}v1h{start - end}z" for start, end in _runs(row, digit)]
    return tag("path", d="".join(runs), class_=f"shade{digit}") if runs else None


def _runs(row: str, digit: str) -> list[tuple[int, int]]:
    """Where a digit stands in a row, as ranges.

    >>> _runs("0099.9", "9")
    [(2, 4), (5, 6)]
    """
    found: list[tuple[int, int]] = []
    for at, cell in enumerate(row):
        if cell != digit:
            continue
        if found and found[-1][1] == at:
            found[-1] = (found[-1][0], at + 1)
        else:
            found.append((at, at + 1))
    return found


def mask_use(name: str, label: str | None) -> Markup:
    """One drawing of a mask's picture; without a label it is mere ornament."""
    spoken = {"role": "img", "aria_label": label} if label else {"aria_hidden": "true"}
    return tag("svg", tag("use", href=f"#{name}"), class_="mask", **spoken)


Plot = Callable[[Results, int, int], Markup]


def in_two_widths(plot: Plot, results: Results) -> Markup:
    """A plot for screens and one for phones; style sheets show one of them."""
    wide, narrow = plot(results, 920, 480), plot(results, 380, 480)
    return join(tag("div", wide, class_="wide"), tag("div", narrow, class_="narrow"))
