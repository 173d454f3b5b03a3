"""The results as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from foveate.lab.results import Entry, Results

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
        "" if exact else f"{quality.change:+.2%}",
        "" if exact else f"{quality.change_high:+.2%}",
        f"{quality.agreement:.1%}",
        f"{looked.mass:.0%}",
        f"{looked.visible:.0%}",
    ]


def seconds(value: float) -> str:
    """A time to three digits, in the unit that suits it.

    >>> seconds(0.01234), seconds(12.34)
    ('12.3 ms', '12.3 s')
    """
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def size(value: int | None) -> str:
    """A size in bytes to three digits.

    >>> size(1_234_567), size(None)
    ('1.23 MB', '-')
    """
    if value is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value} B"


def _caption(results: Results) -> str:
    recommendation = results.recommendation
    if recommendation is None:
        return ""
    take = f"Take {recommendation.name}" if recommendation.name else "Keep exact attention"
    return escape(f"{take}: {recommendation.reason}.")
