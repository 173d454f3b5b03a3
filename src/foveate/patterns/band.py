"""Patterns that are a band: a query sees the keys whose distance lies in one range."""

from __future__ import annotations

from typing import NamedTuple

from foveate.layouts.kinds import Layout, Sequence
from foveate.patterns.algebra import Pattern
from foveate.patterns.compound import And
from foveate.patterns.part import Part
from foveate.patterns.rules.sequence import Causal, Full, Window

UNBOUNDED = 2**40  # a distance beyond every length


class Band(NamedTuple):
    """Visible where ``low <= query position - key position <= high``."""

    low: int
    high: int


def band_of(pattern: Pattern, layout: Layout) -> Band | None:
    """The band that a pattern is, or None.

    >>> from foveate import Sequence, causal, sinks, window
    >>> band_of(window(8) & causal, Sequence())
    Band(low=0, high=8)
    >>> band_of(causal | sinks(4), Sequence()) is None
    True
    """
    return _band(pattern) if isinstance(layout, Sequence) else None


def _band(pattern: Pattern) -> Band | None:
    if isinstance(pattern, Full):
        return Band(-UNBOUNDED, UNBOUNDED)
    if isinstance(pattern, Causal):
        return Band(0, UNBOUNDED)
    if isinstance(pattern, Window):
        return Band(-pattern.right, pattern.left)
    if isinstance(pattern, Part):
        return _shifted(_band(pattern.whole), pattern)
    if not isinstance(pattern, And):
        return None
    bands = [_band(part) for part in pattern.parts]
    if any(band is None for band in bands):
        return None
    known = [band for band in bands if band is not None]
    return Band(max(band.low for band in known), min(band.high for band in known))


def _shifted(band: Band | None, part: Part) -> Band | None:
    """A band as consecutive queries of it see it, whose own first query and key count as 0."""
    if band is None or part.step != 1:
        return None
    shift = part.offset - part.first_query + part.first_key
    return Band(*(side if abs(side) >= UNBOUNDED else side + shift for side in band))
