"""Patterns: which pairs a query may see, and the selections that kernels run."""

from foveate.patterns.algebra import Pattern, Scene, per_head, resolve
from foveate.patterns.layouts import Grid, Layout, Packed, Points, Sequence
from foveate.patterns.selection import Selection
from foveate.patterns.sequence import (
    blocks,
    causal,
    dilated,
    documents,
    full,
    global_tokens,
    key_padding,
    power_of_two,
    prefix,
    random_blocks,
    sinks,
    strided,
    window,
)

__all__ = [
    "Grid",
    "Layout",
    "Packed",
    "Pattern",
    "Points",
    "Scene",
    "Selection",
    "Sequence",
    "blocks",
    "causal",
    "dilated",
    "documents",
    "full",
    "global_tokens",
    "key_padding",
    "per_head",
    "power_of_two",
    "prefix",
    "random_blocks",
    "resolve",
    "sinks",
    "strided",
    "window",
]
