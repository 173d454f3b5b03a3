"""Patterns: which pairs a query may see, and the selections that kernels run."""

from foveate.patterns.algebra import Pattern, Scene, resolve
from foveate.patterns.compound import per_head
from foveate.patterns.dynamic import mass_blocks, topk_blocks, topk_keys, vertical_slash
from foveate.patterns.flex import to_block_mask
from foveate.patterns.grid import neighborhood, strips, window_partition
from foveate.patterns.layouts import Grid, Layout, Packed, Points, Sequence
from foveate.patterns.listed import documents, global_tokens, key_padding, random_blocks
from foveate.patterns.parse import parse
from foveate.patterns.points import within
from foveate.patterns.selection import Selection
from foveate.patterns.sequence import (
    blocks,
    causal,
    dilated,
    full,
    power_of_two,
    prefix,
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
    "mass_blocks",
    "neighborhood",
    "parse",
    "per_head",
    "power_of_two",
    "prefix",
    "random_blocks",
    "resolve",
    "sinks",
    "strided",
    "strips",
    "to_block_mask",
    "topk_blocks",
    "topk_keys",
    "vertical_slash",
    "window",
    "window_partition",
    "within",
]
