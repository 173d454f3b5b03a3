"""Patterns: which pairs a query may see, and the selections that kernels run."""

from foveate.patterns.algebra import Pattern, Scene, resolve
from foveate.patterns.beside import Beside
from foveate.patterns.buckets import same_bucket
from foveate.patterns.compound import per_head
from foveate.patterns.derived import document_prefix, shared_prefix, spans
from foveate.patterns.diffusion import block_diffusion
from foveate.patterns.dynamic import mass_blocks, topk_blocks, topk_keys, vertical_slash
from foveate.patterns.flex import to_block_mask
from foveate.patterns.functions import mask_mod
from foveate.patterns.grid import neighborhood, sta, strips, window_partition
from foveate.patterns.layouts import Grid, Layout, Packed, Points, Sequence
from foveate.patterns.listed import document_numbers, documents, global_tokens, key_padding, random_blocks
from foveate.patterns.lsh import lsh
from foveate.patterns.masks import block_mask, boolean_mask, listed_blocks
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
    "Beside",
    "Grid",
    "Layout",
    "Packed",
    "Pattern",
    "Points",
    "Scene",
    "Selection",
    "Sequence",
    "block_diffusion",
    "block_mask",
    "blocks",
    "boolean_mask",
    "causal",
    "dilated",
    "document_numbers",
    "document_prefix",
    "documents",
    "full",
    "global_tokens",
    "key_padding",
    "listed_blocks",
    "lsh",
    "mask_mod",
    "mass_blocks",
    "neighborhood",
    "parse",
    "per_head",
    "power_of_two",
    "prefix",
    "random_blocks",
    "resolve",
    "same_bucket",
    "shared_prefix",
    "sinks",
    "spans",
    "sta",
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
