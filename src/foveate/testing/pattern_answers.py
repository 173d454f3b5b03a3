"""Properties of what a pattern answers."""

from __future__ import annotations

import torch

from foveate.patterns.select.build import select
from foveate.testing.pattern_case import Heads, Sight, random_boxes
from foveate.testing.report import Skip

TILES = (8, 16, 64)
ROWS = 5  # decoded one at a time


def selection(sight: Sight) -> None:
    """The selection shows the pairs that the definition shows, whatever the tile."""
    heads = sight.draw()
    shown = sight.mask(heads)
    for tile in TILES:
        found = select(sight.pattern, heads.q, heads.k, sight.layout, tile=tile).to_dense()
        wrong = int((found != shown).sum())
        assert not wrong, f"a selection of {tile} x {tile} tiles gets {wrong} of {shown.numel()} pairs wrong"


def bounds(sight: Sight) -> None:
    """A box said to hold no visible pair, or only such, does."""
    heads = sight.draw()
    scene, resolved = sight.scene(heads), sight.resolved(heads)
    boxes, pairs = random_boxes(sight, resolved, scene)
    some, every = resolved.bounds(boxes)
    shown = sight.mask(heads)[boxes.batch, boxes.head]  # (T, N, M)
    missed = int((~some & (shown & pairs).any((1, 2))).sum())
    assert not missed, f"{missed} of {len(pairs)} boxes are said to be empty, but are not"
    beyond = int((every & (pairs & ~shown).any((1, 2))).sum())
    assert not beyond, f"{beyond} of {len(pairs)} boxes are said to be full, but are not"


def causality(sight: Sight) -> None:
    """``is_causal`` promises that no row shows a later key, or changes with a later token."""
    if not sight.pattern.is_causal:
        raise Skip("it does not claim to be causal")
    heads, offset = sight.draw(), sight.num_keys - sight.num_queries
    shown = sight.mask(heads)
    later = torch.ones(sight.num_queries, sight.num_keys, dtype=torch.bool).triu(offset + 1)
    assert not (shown & later).any(), f"{int((shown & later).sum())} pairs show the future"
    cut = int(torch.randint(sight.num_queries, ()))
    changed = Heads(_renewed(heads.q, cut), _renewed(heads.k, cut + offset), heads.v)
    moved = int((sight.mask(changed) != shown)[:, :, :cut].sum())
    assert not moved, f"tokens from query {cut} on change {moved} pairs of earlier queries"


def _renewed(x: torch.Tensor, start: int) -> torch.Tensor:
    return torch.cat([x[:, :, :start], torch.randn_like(x[:, :, start:])], dim=2)


def decoding(sight: Sight) -> None:
    """The row of a query that comes last is its row among later ones."""
    if not sight.pattern.is_causal:
        raise Skip("it does not claim to be causal")
    if sight.layout is not None and sight.layout.length is not None:
        raise Skip("its layout has a fixed number of tokens")
    heads, offset = sight.draw(), sight.num_keys - sight.num_queries
    shown = sight.mask(heads)
    for i in torch.randint(sight.num_queries, (ROWS,)).tolist():
        now = i + offset + 1
        one = Sight(sight.pattern, sight.layout, 1, now)
        row = one.mask(Heads(heads.q[:, :, i : i + 1], heads.k[:, :, :now], heads.v[:, :, :now]))
        wrong = int((row[:, :, 0] != shown[:, :, i, :now]).sum())
        assert not wrong, f"decoding query {i} gets {wrong} of its {now} keys wrong"
