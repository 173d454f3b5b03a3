"""docs/catalogue.md, from the registry: `python -m foveate.lab.catalogue_page docs/catalogue.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from foveate.mixers.registry import Row, rows

HEAD = """# The catalogue

{count} mechanisms in {families} families. Each is a registered mixer that passes the conformance suite
(`foveate check NAME`); `foveate show NAME` draws it and counts its costs. This page is made from the registry
by `make docs`.

*Training-free* mechanisms can take the place of the attention in a pretrained model:
`foveate.adapt.use(model, NAME)`. The others have parameters of their own.
"""
COLUMNS = ("mechanism", "what it does", "supports", "training-free", "paper")


def render() -> str:
    """The page.

    >>> render().splitlines()[0]
    '# The catalogue'
    """
    families = [(name, list(group)) for name, group in groupby(rows(), key=lambda row: row.family)]
    head = HEAD.format(count=len(rows()), families=len(families))
    return "\n".join([head, *(_section(name, group) for name, group in families)])


def _section(family: str, group: Iterable[Row]) -> str:
    lines = [_line(COLUMNS), _line("---" for _ in COLUMNS), *(_line(_cells(row)) for row in group)]
    return "\n".join([f"## {family}", "", *lines, ""])


def _cells(row: Row) -> tuple[str, ...]:
    paper = f"{row.paper.authors}, *{row.paper.title}*, [{row.paper.arxiv}]({row.paper.url})"
    does = f"{row.summary}<br>`{row.formula}`"
    return f"`{row.name}`", does, ", ".join(sorted(row.supports)), "yes" if row.core else "no", paper


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
