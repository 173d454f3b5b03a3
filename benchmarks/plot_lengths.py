"""A panel for a group that only our own times belong to: time per token over length, one line a case."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.report import lead
from benchmarks.targets import OURS

INK, FAINT = "#333333", "#dddddd"
COLOURS = ("#2f6f9f", "#c8642a", "#4f8f4f", "#7f5f9f", "#8c6d31", "#b0506e")
TALL = 1.6  # inches


def has_no_rival(group: dict[str, Any]) -> bool:
    """Whether there is nobody to be compared with, only other lengths."""
    return all(lead(case) is None and len(per_token(case)) > 1 for case in group["cases"])


def per_token(case: dict[str, Any]) -> dict[int, float]:
    """Nanoseconds a token, by length.

    >>> times = {"Foveate": {"minimum": 4e-6}, "Foveate, N 500": {"minimum": 2e-6}}
    >>> per_token({"name": "scan, N 2000", "times": times})
    {500: 4.0, 2000: 2.0}
    """
    lengths = {label: _length(case["name"] if label == OURS else label) for label in case["times"]}
    found = {length: 1e9 * case["times"][label]["minimum"] / length for label, length in lengths.items() if length}
    return dict(sorted(found.items()))


def over_lengths(axes: Axes, title: str, cases: list[dict[str, Any]]) -> None:
    """Draw the panel."""
    heading: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center", "color": INK}
    axes.annotate(title, (-0.58, 1), (0, 9), fontsize=10, fontweight="bold", **heading)
    axes.annotate("ns a token, by N", (1.05, 1), (0, 9), fontsize=8, **heading)
    found = [per_token(case) for case in cases]
    for case, colour, times in zip(cases, COLOURS, found, strict=False):
        name = case["name"].rpartition(", N ")[0]
        axes.plot(list(times), list(times.values()), "o-", color=colour, linewidth=1.6, markersize=4, label=name)
    axes.legend(loc="center left", bbox_to_anchor=(1.03, 0.5), frameon=False, fontsize=8, labelcolor=INK)
    lengths = sorted({length for times in found for length in times})
    axes.set_xscale("log")
    axes.set_ylim(0, 1.15 * max(time for times in found for time in times.values()))
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{length // 1024}k" if length % 1024 == 0 else str(length) for length in lengths])
    axes.tick_params(length=0, colors=INK, labelsize=8)
    axes.grid(axis="both", color=FAINT, linewidth=0.6)
    for side in axes.spines.values():
        side.set_visible(False)


def _length(label: str) -> int:
    number = label.rpartition(", N ")[2]
    return int(number) if number.isdigit() else 0
