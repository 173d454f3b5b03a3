"""The results as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from foveate.lab.compare.results import Entry, Recommendation, Results
from foveate.lab.compare.words import percent, seconds, size

if TYPE_CHECKING:
    from rich.table import Table


def table(results: Results) -> Table:
    """All contenders, fastest first; the recommended one is marked."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    about = results.about
    title = f"{escape(about['model']['name'])} at {results.settings['length']:,} tokens"
    drawn = Table(title=title, title_justify="left", caption=_caption(results), caption_justify="left")
    drawn.box, drawn.padding = SIMPLE_HEAD, (0, 0, 0, 0)
    drawn.add_column("mechanism", overflow="fold", vertical="bottom")
    for column in columns(results):
        drawn.add_column(column, justify="right", no_wrap=True)
    chosen = results.recommendation.name if results.recommendation else None
    for entry in results.ranked:
        style = "bold green" if entry.name == chosen else "dim" if entry is results.exact else ""
        drawn.add_row(*(Text(cell, style=style) for cell in row(results, entry)))
    return drawn


def columns(results: Results) -> tuple[str, ...]:
    """Headings of the figures; the loss stands beside its change, unless it is one."""
    measure = results.measure
    agreement = measure.agreement.replace(" ", "\n")
    loss = (measure.loss_column,) if measure.is_distance else (measure.loss_column, "change")
    return (
        *("speed-\nup", measure.passes, "peak\nmemory"),
        *(*loss, "at most\n(95 %)"),
        *(agreement, "mass\nkept", "pairs\nseen"),
    )


def row(results: Results, entry: Entry) -> list[str]:
    """The cells of one contender, in words and figures."""
    quality, looked, exact = entry.quality, entry.looked, entry is results.exact
    distance = results.measure.is_distance
    loss = percent(quality.loss) if distance else f"{quality.loss:.4f}"
    return [
        entry.name,
        "1x" if exact else f"{entry.speedup.median:.2f}x",
        seconds(results.seconds(entry)),
        size(entry.memory.peak_bytes),
        loss,
        *([] if distance else ["" if exact else percent(quality.change, sign=True)]),
        "" if exact else percent(quality.change_high, sign=not distance),
        f"{quality.agreement:.4f}" if distance else percent(quality.agreement),
        percent(looked.mass),
        percent(looked.visible),
    ]


def _caption(results: Results) -> str:
    """The advice, and which mechanisms are not in the table."""
    lines = _not_measured(results)
    advice = results.recommendation
    if advice is not None:
        take = f"Take {advice.name}" if advice.name else verdict(advice)
        lines.append(f"{take}: {advice.reason}.")
    return escape("\n".join(lines))


def verdict(advice: Recommendation) -> str:
    """What to do where no mechanism is recommended."""
    return "No recommendation" if advice.undecided else "Keep exact attention"


def _not_measured(results: Results) -> list[str]:
    """Each with its reason where they were asked for by name, else their number."""
    if results.settings.get("mechanisms") is not None:
        return [f"Not measured: {refusal.name} ({refusal.reason})." for refusal in results.refused]
    number = len(results.refused)
    return [f"Not measured: {number} of the catalogue's mechanisms; the report says why."] if number else []
