"""What was measured, as a table on the screen and a file that partial runs bring up to date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.contest import write_json
from benchmarks.targets import OURS, family


class Record:
    """The JSON of a benchmark: for each group what it was measured on, and its cases."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.groups: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["groups"] if path.exists() else {}

    def add(self, group: str, about: dict[str, Any], cases: list[dict[str, Any]], said: list[str]) -> None:
        """Put these cases, and what they say together, in the place of the group's, and write the file."""
        self.groups[group] = {**about, "cases": cases, **({"said": said} if said else {})}
        write_json(self.path, {"groups": self.groups})


def best(case: dict[str, Any]) -> str:
    """The fastest contender that is not ours; empty if there was none."""
    others = [label for label in case["speedups"] if family(label) != OURS]
    return min(others, key=case["speedups"].__getitem__, default="")


def lead(case: dict[str, Any]) -> float | None:
    """How many times as fast as that one ours is."""
    return case["speedups"].get(best(case))


def table(title: str, group: dict[str, Any]) -> Table:
    """Every contender of every case, then what was wanted of ours."""
    headings = ("case", "contender", "min", "median", "quartiles", "slower", "of limit")
    shown = Table(*headings, title=title, caption="\n".join(map(escape, group.get("said", []))))
    for column in shown.columns[1:]:
        column.no_wrap, column.justify = True, "left" if column.header == "contender" else "right"
    for case in group["cases"]:
        said = [f"{case['name']}, {case['dtype']}", *map(verdict, case["targets"])]
        rows = [_row(case, label) for label in case["times"]]
        for place in range(max(len(rows), len(said))):
            first = said[place] if place < len(said) else ""
            shown.add_row(first, *(rows[place] if place < len(rows) else ()))
        for label, reason in case["not_timed"].items():
            shown.add_row(f"[dim]{escape(f'no {label}: {reason}')}[/]")
        shown.add_section()
    return shown


def _row(case: dict[str, Any], label: str) -> list[str]:
    times, share = case["times"][label], case["of_limit"].get(label)
    least, low, middle, high = (milliseconds(times[key]) for key in ("minimum", "low", "median", "high"))
    ratio = "" if label == OURS else f"{case['speedups'][label]:.2f}x"
    return [label, least, middle, f"{low} to {high}", ratio, "" if share is None else f"{share:.0%}"]


def verdict(target: dict[str, Any]) -> str:
    """One target in words, coloured by whether it was reached."""
    words = escape(target["words"])
    if target["got"] is None:
        return f"[yellow]{words}: not measured[/]"
    colour, mark = ("green", "reached") if target["reached"] else ("red", "missed")
    return f"[{colour}]{words}: {target['got']:.2f}, {mark}[/]"


def milliseconds(seconds: float) -> str:
    """Three digits of what matters.

    >>> milliseconds(0.012345), milliseconds(2.5)
    ('12.3 ms', '2.5 s')
    """
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
