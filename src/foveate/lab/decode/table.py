"""Decoding as a table for the terminal."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from rich.markup import escape

from foveate.lab.compare.words import percent, seconds, size
from foveate.lab.decode.results import Decoding, Decodings

if TYPE_CHECKING:
    from rich.table import Table


def table(found: Decodings) -> Table:
    """Exact attention first, then each method from its smallest budget on; refusals in words below."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    settings, name = found.settings, escape(found.about["model"]["name"])
    title = f"{name}: {settings['continued']} tokens after {settings['length'] - settings['continued']:,}"
    drawn = Table(title=title, title_justify="left", caption=escape(_refused(found)), caption_justify="left")
    drawn.box, drawn.padding = SIMPLE_HEAD, (0, 1, 0, 0)
    drawn.add_column("mechanism", overflow="fold", vertical="bottom")
    heads = (
        "a\ntoken",
        "speed-\nup",
        "token\nholds",
        "token\nreads",
        "bits/\nbyte",
        "change",
        "at most\n(95 %)",
        "same\ntop-1",
    )
    for head in heads:
        drawn.add_column(head, justify="right", no_wrap=True)
    for one in (found.exact, *found.entries):
        drawn.add_row(escape(one.name), *row(found, one), style="dim" if one is found.exact else "")
    return drawn


def row(found: Decodings, one: Decoding) -> list[str]:
    """The cells of one mechanism after its name."""
    quality, took, speed = one.quality, found.seconds(one), found.speed(one)
    exact = one is found.exact
    held = (one.held_bytes + one.host_bytes) / found.tokens
    return [
        "-" if took is None else seconds(took),
        "-" if speed is None else "1x" if exact else f"{speed:.2f}x",
        size(round(held)),
        size(one.read_bytes + one.fetched_bytes),
        f"{quality.loss:.4f}",
        "" if exact else percent(quality.change, sign=True),
        "" if exact else percent(quality.change_high, sign=True),
        percent(quality.agreement),
    ]


def _refused(found: Decodings) -> str:
    """What was not measured, by reason."""
    by_reason = groupby(sorted(found.refused, key=lambda one: (one.reason, one.name)), key=lambda one: one.reason)
    return "\n".join(f"Not measured: {', '.join(one.name for one in group)}: {reason}" for reason, group in by_reason)
