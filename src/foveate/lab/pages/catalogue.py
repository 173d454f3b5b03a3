"""docs/catalogue.md, from the index: `python -m foveate.lab.pages.catalogue docs/catalogue.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from foveate.catalogue.index import Entry, catalogue
from foveate.catalogue.papers import Reference, papers

HEAD = """# The catalogue

{count} rows in {families} families. Most are operators: mixers that pass the conformance suite (`foveate check NAME`).
Models, methods, recipes and the other tiers pass the suites of theirs (`foveate.testing`). `foveate show NAME` tells of
each, draws operators and counts their costs. This page is made from the index by `make docs`. That a row is here does
not say that its paper is kept: `foveate rows` says which are, by tests of their definitions and of what must work, and
what the others want.

*Training-free* mechanisms can take the place of the attention in a pretrained model:
`foveate.adapt.use(model, NAME)`. The others have parameters of their own.
"""
COLUMNS = ("mechanism", "tier", "what it does", "supports", "training-free", "paper")


def render() -> str:
    """The page.

    >>> render().splitlines()[0]
    '# The catalogue'
    """
    entries = catalogue().entries
    families = [(name, list(group)) for name, group in groupby(entries, key=lambda entry: entry.family)]
    head = HEAD.format(count=len(entries), families=len(families))
    return "\n".join([head, *(_section(name, group) for name, group in families)])


def _section(family: str, group: Iterable[Entry]) -> str:
    lines = [_line(COLUMNS), _line("---" for _ in COLUMNS), *(_line(_cells(entry)) for entry in group)]
    return "\n".join([f"## {family}", "", *lines, ""])


def _cells(entry: Entry) -> tuple[str, ...]:
    sources: list[Reference] = [papers()[key] for key in entry.papers] or [entry.source]
    does = f"{entry.summary}<br>`{entry.formula}`" if entry.formula else entry.summary
    free = "yes" if entry.training_free else "no"
    return f"`{entry.name}`", entry.tier, does, ", ".join(entry.supports), free, "<br>".join(map(_cited, sources))


def _cited(source: Reference) -> str:
    link = f"[{source.id}]({source.url})" if source.id else ""
    return ", ".join(filter(None, (source.authors, f"*{source.title}*", link)))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
