"""Answers as a table for the terminal: a row for each task and mechanism, a column for each length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from foveate.lab.questions.kinds import CANDIDATES
from foveate.lab.questions.results import Answers, Cell

if TYPE_CHECKING:
    from rich.table import Table


def table(answers: Answers) -> Table:
    """Percent of questions whose answer was ranked first, and of those where it was written, over all depths."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    lengths = sorted({cell.length for cell in answers.cells})
    drawn = Table(title=f"Questions asked of {escape(answers.about['model']['name'])}", title_justify="left")
    drawn.box, drawn.caption_justify = SIMPLE_HEAD, "left"
    lines = [f"Ranked first of {CANDIDATES} candidates / written out greedily, over all depths; by chance "
             f"{1 / CANDIDATES:.0%} / 0%."]  # fmt: skip
    drawn.caption = escape("\n".join([*lines, *(f"Not asked: {one.name}: {one.reason}" for one in answers.refused)]))
    drawn.add_column("task")
    drawn.add_column("mechanism", overflow="fold")
    for length in lengths:
        drawn.add_column(f"{length:,}", justify="right", no_wrap=True)
    for task in answers.tasks:
        for name, cells in answers.of(task).items():
            drawn.add_row(task, escape(name), *(share([c for c in cells if c.length == n]) for n in lengths))
    return drawn


def share(cells: list[Cell]) -> str:
    """Both shares of some cells.

    >>> share([Cell("needle", "exact", 99, 0.5, 4, 3, 1, 2.0)])
    '75% / 25%'
    """
    asked = sum(cell.asked for cell in cells)
    if not asked:
        return "-"
    return f"{sum(cell.ranked for cell in cells) / asked:.0%} / {sum(cell.written for cell in cells) / asked:.0%}"
