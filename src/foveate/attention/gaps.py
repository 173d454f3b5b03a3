"""Padding between two tokens of one text, which biases by distance cannot leave out."""

from __future__ import annotations

from collections.abc import Sequence

from foveate.attention.bias import Alibi, Bias, LogDecay, RelativeTable
from foveate.patterns.algebra import Pattern
from foveate.patterns.layouts import Layout
from foveate.patterns.placed import split


def check_gaps(pattern: Pattern, biases: Sequence[Bias], layout: Layout, num_keys: int) -> None:
    """Refuse biases by distance where they would count padding."""
    if layout.num_axes or not any(isinstance(bias, (Alibi, LogDecay, RelativeTable)) for bias in biases):
        return
    _, place = split(pattern, layout, num_keys)
    if place is not None and not place.keeps_distances:
        raise ValueError("a bias by distance cannot tell padding between two tokens of a text from tokens: remove it")
