"""The figures as a picture: one panel a group, one line a case."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.plot_lengths import TALL, has_no_rival, over_lengths
from benchmarks.report import best, lead, milliseconds
from benchmarks.targets import OURS
from foveate.lab.measure import machine

COLOURS = {"float32": "#2f6f9f", "bfloat16": "#c8642a"}
INK, FAINT = "#333333", "#dddddd"
# inches
WIDTH = 14.0
LINE = 0.2  # a case
TITLE = 0.82  # a panel's title, headings and axis
HEADING = 1.0


def draw(titles: Mapping[str, str], groups: dict[str, Any], path: Path) -> Path:
    """Write the picture of a benchmark's groups, in the order of their titles."""
    names = [name for name in titles if name in groups]
    columns = _columns(names, groups)
    height = HEADING + max(sum(_height(groups[name]) for name in column) for column in columns)
    figure = Figure(figsize=(WIDTH, height))
    for place, column in enumerate(columns):
        top = height - HEADING
        for name in column:
            tall = _height(groups[name]) - TITLE
            box = ((place + 0.26) / 2, (top - TITLE / 2 - tall) / height, 0.40 / 2, tall / height)
            panel = over_lengths if has_no_rival(groups[name]) else _panel
            panel(figure.add_axes(box), titles[name], groups[name]["cases"])
            top -= _height(groups[name])
    _head(figure, groups[names[0]], height)
    with matplotlib.rc_context({"svg.hashsalt": "foveate"}):
        figure.savefig(path, metadata={"Date": None})
    return path


def strictest(case: dict[str, Any]) -> float | None:
    """Times as fast as the best other contender that would meet every target; None if no target could be judged."""
    ratio = lead(case)
    marks = [target["wanted"] / target["got"] for target in case["targets"] if target["got"]]
    return ratio * max(marks) if marks and ratio is not None else None


def _columns(names: list[str], groups: dict[str, Any]) -> list[list[str]]:
    """Groups in order, split in two where it is most even."""

    def taller(split: int) -> float:
        return max(sum(_height(groups[name]) for name in part) for part in (names[:split], names[split:]))

    split = min(range(1, len(names) + 1), key=taller)
    return [names[:split], names[split:]]


def _height(group: dict[str, Any]) -> float:
    return TITLE + (TALL if has_no_rival(group) else LINE * len(group["cases"]))


def _panel(axes: Axes, title: str, cases: list[dict[str, Any]]) -> None:
    across = axes.get_yaxis_transform()
    axes.text(-0.58, -1.15, title, transform=across, va="center", fontsize=10, fontweight="bold", color=INK)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    _scale(axes, [x for case in cases for x in (lead(case), strictest(case)) if x is not None])
    axes.set_yticks(range(len(cases)), [case["name"] for case in cases], fontsize=8)
    axes.tick_params(length=0, colors=INK)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.axvline(1, color=INK, linewidth=0.9, zorder=1)
    _beside(axes, -1.15, "time", "of limit", "fastest other")
    for row, case in enumerate(cases):
        _line(axes, row, case)


def _scale(axes: Axes, values: list[float]) -> None:
    """Powers of two (of four where there are many), with room for the points at the ends."""
    low, high = min([0.8, *values]) / 1.15, max([2.5, *values]) * 1.15
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    ticks = [2.0**power for power in powers if len(powers) < 7 or power % 2 == 0]
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{tick:g}x" for tick in ticks], fontsize=8)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _line(axes: Axes, row: int, case: dict[str, Any]) -> None:
    colour, ratio, wanted = COLOURS[case["dtype"]], lead(case), strictest(case)
    if ratio is not None:
        inside = colour if all(target["reached"] is not False for target in case["targets"]) else "white"
        axes.plot([1, ratio], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt", zorder=2)
        axes.plot(ratio, row, "o", color=colour, markerfacecolor=inside, markersize=6, zorder=4)
    if wanted is not None:
        axes.plot([wanted, wanted], [row - 0.33, row + 0.33], color=INK, linewidth=1.3, zorder=3)
    share = case["of_limit"].get(OURS)
    said = "" if share is None else f"{share:.0%}"
    _beside(axes, row, milliseconds(case["times"][OURS]["minimum"]), said, best(case))


def _beside(axes: Axes, row: float, *words: str) -> None:
    """Words in the columns to the right of a panel."""
    across = axes.get_yaxis_transform()
    for said, (place, side) in zip(words, ((1.20, "right"), (1.38, "right"), (1.43, "left")), strict=True):
        axes.text(place, row, said, transform=across, ha=side, va="center", fontsize=8, color=INK)


def _head(figure: Figure, group: dict[str, Any], height: float) -> None:
    limits = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in group["limits"].items())
    words = f"{machine.in_words(group['machine'])}; {group['threads']} threads, kernels for {group['isa']}"
    title = "Times as fast as the fastest other contender"
    figure.text(0.02, 1 - 0.30 / height, title, fontsize=15, color=INK, va="center")
    figure.text(0.02, 1 - 0.60 / height, f"{words}. Limits: {limits}", fontsize=9, color=INK, va="center")
    marks = [Line2D([], [], color=colour, marker="o", linewidth=2.2, label=dtype) for dtype, colour in COLOURS.items()]
    marks.append(Line2D([], [], color=INK, marker="o", markerfacecolor="white", linestyle="", label="misses a target"))
    marks.append(Line2D([], [], color=INK, marker="|", markersize=9, linestyle="", label="every target"))
    corner = (0.985, 1 - 0.12 / height)
    figure.legend(handles=marks, loc="upper right", bbox_to_anchor=corner, ncols=4, frameon=False, fontsize=9)
