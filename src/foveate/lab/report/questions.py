"""The report's section on questions: a heat map of lengths and depths for each task and mechanism."""

from __future__ import annotations

from collections.abc import Callable

from foveate.lab.questions.kinds import CANDIDATES
from foveate.lab.questions.results import Answers, Cell
from foveate.lab.report.markup import Markup, join, tag
from foveate.lab.report.page import refusals
from foveate.lab.report.svg import drawing, text

TITLES = {
    "needle": "Needle: one line says the value of a name",
    "recall": "Recall: one of eight names and values that follow one another",
    "multikey": "Many keys: one of four needles all over the text",
    "variables": "Variable tracking: the value at the end of one of two chains of assignments",
    "aggregation": "Aggregation: the most common of a list of words",
}
CELL, LEFT, TOP = (46, 24), 44, 8


def questions_section(answers: Answers) -> Markup:
    """All heat maps, task by task."""
    settings = answers.settings
    said = (
        f"Lines are put into a text at a depth, from its beginning (0%) to its end (100%), and its last line asks for "
        f"what they said: {settings['samples']} questions for each length and depth. "
        f"Cells show how many percent had the right answer ranked before {CANDIDATES - 1} wrong ones of its form "
        f"({100 // CANDIDATES} by chance), and below how many were written out by greedy decoding."
    )
    stopped = "Stopped early: cells that are missing were not asked."
    return tag(
        "section",
        tag("h2", "Questions about long texts"),
        tag("p", stopped, class_="stopped") if answers.interrupted else None,
        tag("p", said),
        *(_of_task(answers, task) for task in answers.tasks),
        refusals(answers.refused),
    )


def _of_task(answers: Answers, task: str) -> Markup:
    figures = [_figure(name, cells) for name, cells in answers.of(task).items()]
    return join(tag("h3", TITLES.get(task, task)), tag("div", *figures, class_="heats"))


def _figure(name: str, cells: list[Cell]) -> Markup:
    asked = sum(cell.asked for cell in cells)
    ranked, written = (sum(getattr(cell, field) for cell in cells) / asked for field in ("ranked", "written"))
    caption = tag("figcaption", tag("code", name), tag("small", f"{ranked:.0%} ranked first, {written:.0%} written"))
    maps = [
        heat_map(cells, lambda c: c.ranked / c.asked, "ranked"),
        heat_map(cells, lambda c: c.written / c.asked, "written"),
    ]
    return tag("figure", *maps, caption)


def heat_map(cells: list[Cell], share: Callable[[Cell], float], what: str) -> Markup:
    """Lengths to the right, depths downwards; the darker a cell, the more of its questions were answered."""
    lengths, depths = sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})
    wide, high = CELL
    parts: list[Markup] = []
    for cell in cells:
        x, y = LEFT + wide * lengths.index(cell.length), TOP + high * depths.index(cell.depth)
        value = share(cell)
        said = f"{cell.length:,} tokens, depth {cell.depth:.0%}: {value:.0%} {what}"
        box = tag("rect", tag("title", said), x=x + 1, y=y + 1, width=wide - 2, height=high - 2, rx=2,
                  class_="heat", style=f"opacity:{0.06 + 0.94 * value:.2f}")  # fmt: skip
        style = "heat-high" if value > 0.55 else "heat-low"
        parts += [box, text(x + wide / 2, y + high / 2 + 4, f"{100 * value:.0f}", anchor="middle", class_=style)]
    for number, depth in enumerate(depths):
        parts.append(text(LEFT - 6, TOP + high * number + high / 2 + 4, f"{depth:.0%}", anchor="end", class_="tick"))
    below = TOP + high * len(depths)
    for number, length in enumerate(lengths):
        parts.append(text(LEFT + wide * (number + 0.5), below + 14, _short(length), anchor="middle", class_="tick"))
    size = LEFT + wide * len(lengths) + 6, below + 22
    return drawing(*size, *parts, label=f"Share of answers {what}, by length and depth")


def _short(length: int) -> str:
    """A length in few letters.

    >>> _short(8192), _short(1000)
    ('8k', '1000')
    """
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
