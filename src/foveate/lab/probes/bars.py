"""A picture of a finding: a bar for each figure."""

from __future__ import annotations

from collections.abc import Mapping

from foveate.lab.report.markup import tag
from foveate.lab.report.svg import text

WIDTH, ROW, LEFT = 640, 26, 260


def bars(title: str, values: Mapping[str, float], unit: str) -> str:
    """An SVG file with a bar for each value, none negative, from 0 on.

    >>> bars("squares", {"two": 4.0, "three": 9.0}, "n²").startswith("<svg")
    True
    """
    most = max(values.values(), default=0.0) or 1.0
    parts = []
    for number, (name, value) in enumerate(values.items()):
        top, width = 44 + ROW * number, (WIDTH - LEFT - 90) * max(value, 0.0) / most
        parts += [
            text(LEFT - 10, top + 15, name, anchor="end"),
            tag("rect", x=float(LEFT), y=float(top), width=max(width, 1.0), height=float(ROW - 6), fill="#2f6f9f"),
            text(LEFT + width + 8, top + 15, f"{value:.3g}"),
        ]
    height = 60 + ROW * len(values)
    return tag(
        "svg",
        tag("rect", width=float(WIDTH), height=float(height), fill="#fff"),
        text(10, 22, f"{title} ({unit})"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=title,
        font_family="ui-monospace, monospace",
        font_size=12.0,
    )
