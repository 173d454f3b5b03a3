"""Properties of what a pattern answers."""

from __future__ import annotations

import torch

from foveate.patterns.select.build import select
from foveate.testing.pattern_case import Heads, PatternCase, random_boxes
from foveate.testing.report import Skip

TILES = (8, 16, 64)
ROWS = 5  # decoded one at a time


def selection(case: PatternCase) -> None:
    """The selection shows the pairs that the definition shows, whatever the tile."""
    heads = case.draw()
    shown = case.mask(heads)
    for tile in TILES:
        found = select(case.pattern, heads.q, heads.k, case.layout, tile=tile).to_dense()
        wrong = int((found != shown).sum())
        assert not wrong, f"a selection of {tile} x {tile} tiles gets {wrong} of {shown.numel()} pairs wrong"


def bounds(case: PatternCase) -> None:
    """A box said to hold no visible pair, or only such, does."""
    heads = case.draw()
    scene, resolved = case.scene(heads), case.resolved(heads)
    boxes, pairs = random_boxes(case, resolved, scene)
    some, every = resolved.bounds(boxes)
    shown = case.mask(heads)[boxes.batch, boxes.head]  # (T, N, M)
    missed = int((~some & (shown & pairs).any((1, 2))).sum())
    assert not missed, f"{missed} of {len(pairs)} boxes are said to be empty, but are not"
    beyond = int((every & (pairs & ~shown).any((1, 2))).sum())
    assert not beyond, f"{beyond} of {len(pairs)} boxes are said to be full, but are not"


def causality(case: PatternCase) -> None:
    """``is_causal`` promises that no row shows a later key, or changes with a later token."""
    if not case.pattern.is_causal:
        raise Skip("it does not claim to be causal")
    heads, offset = case.draw(), case.num_keys - case.num_queries
    shown = case.mask(heads)
    later = torch.ones(case.num_queries, case.num_keys, dtype=torch.bool).triu(offset + 1)
    assert not (shown & later).any(), f"{int((shown & later).sum())} pairs show the future"
    cut = int(torch.randint(case.num_queries, ()))
    changed = Heads(_renewed(heads.q, cut), _renewed(heads.k, cut + offset), heads.v)
    moved = int((case.mask(changed) != shown)[:, :, :cut].sum())
    assert not moved, f"tokens from query {cut} on change {moved} pairs of earlier queries"


def _renewed(x: torch.Tensor, start: int) -> torch.Tensor:
    return torch.cat([x[:, :, :start], torch.randn_like(x[:, :, start:])], dim=2)


def decoding(case: PatternCase) -> None:
    """The row of a query that comes last is its row among later ones."""
    if not case.pattern.is_causal:
        raise Skip("it does not claim to be causal")
    if case.layout is not None and case.layout.length is not None:
        raise Skip("its layout has a fixed number of tokens")
    heads, offset = case.draw(), case.num_keys - case.num_queries
    shown = case.mask(heads)
    for i in torch.randint(case.num_queries, (ROWS,)).tolist():
        now = i + offset + 1
        one = PatternCase(case.pattern, case.layout, 1, now)
        row = one.mask(Heads(heads.q[:, :, i : i + 1], heads.k[:, :, :now], heads.v[:, :, :now]))
        wrong = int((row[:, :, 0] != shown[:, :, i, :now]).sum())
        assert not wrong, f"decoding query {i} gets {wrong} of its {now} keys wrong"
