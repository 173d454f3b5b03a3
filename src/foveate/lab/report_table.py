"""The results as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from foveate.lab.results import Entry, Results
from foveate.lab.results_words import percent, seconds, size

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "speed-\nup",
    "prefill",
    "peak\nmemory",
    "bits/\nbyte",
    "change",
    "at most\n(95 %)",
    "same\ntop-1",
    "mass\nkept",
    "pairs\nseen",
)


def table(results: Results) -> Table:
    """All contenders, fastest first; the recommended one is marked."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    about = results.about
    title = f"{escape(about['model']['name'])} at {results.settings['length']:,} tokens"
    drawn = Table(title=title, title_justify="left", caption=_caption(results), caption_justify="left")
    drawn.box, drawn.padding = SIMPLE_HEAD, (0, 0, 0, 0)
    drawn.add_column("mechanism", overflow="fold", vertical="bottom")
    for column in COLUMNS:
        drawn.add_column(column, justify="right", no_wrap=True)
    chosen = results.recommendation.name if results.recommendation else None
    for entry in results.ranked:
        mark = "[bold green]" if entry.name == chosen else "[dim]" if entry is results.exact else ""
        drawn.add_row(*(f"{mark}{escape(cell)}" for cell in row(entry, exact=entry is results.exact)))
    return drawn


def row(entry: Entry, *, exact: bool = False) -> list[str]:
    """The cells of one contender, in words and figures."""
    quality, looked = entry.quality, entry.looked
    return [
        entry.name,
        "1x" if exact else f"{entry.speedup.median:.2f}x",
        seconds(entry.seconds.median),
        size(entry.memory.peak_bytes),
        f"{quality.bits_per_byte:.4f}",
        "" if exact else percent(quality.change, sign=True),
        "" if exact else percent(quality.change_high, sign=True),
        percent(quality.agreement),
        percent(looked.mass),
        percent(looked.visible),
    ]


def _caption(results: Results) -> str:
    """The advice, and which mechanisms are not in the table."""
    lines = _not_measured(results)
    advice = results.recommendation
    if advice is not None:
        take = f"Take {advice.name}" if advice.name else "Keep exact attention"
        lines.append(f"{take}: {advice.reason}.")
    return escape("\n".join(lines))


def _not_measured(results: Results) -> list[str]:
    """Each with its reason where they were asked for by name, else their number."""
    if results.settings.get("mechanisms") is not None:
        return [f"Not measured: {refusal.name} ({refusal.reason})." for refusal in results.refused]
    number = len(results.refused)
    return [f"Not measured: {number} of the catalogue's mechanisms; the report says why."] if number else []
