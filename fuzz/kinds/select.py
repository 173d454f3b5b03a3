"""Selections: what kernels are told to run is what each pair of positions answers; and how blocks are chosen."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor

import foveate as fv
from foveate.patterns import Scene, Selection
from foveate.patterns.rules.choose import Sought, choose_rows, pool
from foveate.patterns.rules.decided import no_rows
from foveate.patterns.select import native
from fuzz import trees
from fuzz.cases import kind
from fuzz.dense import mask_of
from fuzz.draw import DTYPES, Draw
from fuzz.judge import Judge, demand, same
from fuzz.kinds.attend import lengths, tree
from fuzz.settings import anything

WHOLE = 2**30  # shares are whole numbers of these


@kind("select", 10)
def select(draw: Draw) -> None:
    """The selection of a pattern, as a dense mask; sometimes list by list beside the builder in torch."""
    n, m, layout = trees.layout(draw, *lengths(draw))
    n = min(n, m) if isinstance(layout, fv.Points) else n
    heads, batch = draw.one((1, 2, 4)), draw.one((1, 2, 3))
    groups, dim = draw.divisor(heads), draw.whole(1, 9)
    dtype, scale = draw.one(DTYPES), draw.one((None, 0.3))
    q, k = draw.tensor(batch, heads, n, dim, dtype=dtype), draw.tensor(batch, groups, m, dim, dtype=dtype)
    pattern = tree(draw, trees.Place(batch, heads, groups, n, m, layout))
    expected = mask_of(pattern, Scene(n, m, layout or fv.Sequence(), q, k, scale))
    tile = 64 if draw.chance(0.9) else draw.one((8, 16, 24, 128))
    with anything(draw):
        found = pattern.select(draw.placed(q), draw.placed(k), layout, tile=tile, scale=scale)
    seen = found.to_dense()
    demand(seen.shape[2:] == expected.shape[2:], f"{pattern}: {tuple(seen.shape)}, not {tuple(expected.shape)}")
    if not expected.numel():
        return
    demand(seen.shape == expected.shape, f"{pattern}: {tuple(seen.shape)}, not {tuple(expected.shape)}")
    wrong = (seen != expected).nonzero()
    demand(not len(wrong), f"{pattern} on {layout}: {len(wrong)} pairs, first {wrong[:1].tolist()}")
    demand(found.pairs == int(expected.sum()), f"{pattern} counts {found.pairs} pairs of {int(expected.sum())}")
    if tile == 64 and draw.chance(0.1):
        with mock.patch.object(native, "select", lambda *_, **__: None):
            torch_built = pattern.select(q.clone(), k.clone(), layout, scale=scale)
        if pattern.is_dynamic or pattern.tensors:  # others come from a cache
            alike(found, torch_built)


def alike(one: Selection, other: Selection) -> None:
    for name in ("tile_starts", "tile_ids", "column_starts", "column_ids", "column_masks"):
        same(name, getattr(one, name), getattr(other, name))


@kind("choose", 9)
def choose(draw: Draw) -> None:
    """The best scores of a row, or the fewest shares that suffice: a few lines of Python say which."""
    batch, heads, rows, blocks = draw.batch(), draw.whole(1, 3), draw.length(70), draw.length(130)
    weights = draw.normal(batch, heads, rows, blocks).float()
    weights = weights.mul(draw.one((1, 3))).round() if draw.chance(0.3) else weights  # ties
    by_share, q_block = draw.chance(0.4), draw.one((1, 2, 3, 16, 64, 100))
    own = None
    if draw.chance(0.5):
        own = torch.tensor(sorted(draw.whole(0, max(0, blocks - 1)) for _ in range(rows)), dtype=torch.long)
        own = own if blocks else None
    if by_share:
        weights = torch.softmax(weights, -1)
        sought = Sought(draw.one((0.001, 0.3, 0.9, 0.999, 1.0)), by_share=True)
    else:
        sought = Sought(draw.whole(0, 9))
        weights = weights.masked_fill(draw.bits(draw.one((0.0, 0.3)), *weights.shape), float("-inf"))
    out = no_rows(batch, heads, rows, blocks, q_block=q_block, device=torch.device("cpu"))
    with anything(draw):
        choose_rows(weights.clone(), sought, out, q_block, own=own)
    expected = chosen(weights, sought, own)
    got = unpacked(out, rows, q_block)
    wrong = (got != expected).nonzero()
    demand(
        not len(wrong), f"{sought}, own {own is not None}: {len(wrong)} of {got.numel()}, first {wrong[:1].tolist()}"
    )


def chosen(weights: Tensor, sought: Sought, own: Tensor | None) -> Tensor:
    blocks = weights.shape[-1]
    allowed = torch.ones_like(weights, dtype=torch.bool) if own is None else torch.arange(blocks) < own.unsqueeze(1)
    ranked = torch.where(allowed, weights, float("-inf"))
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(blocks).expand(order.shape))
    if sought.by_share and sought.number < 1:
        steps = (ranked.clamp_min(0).double() * WHOLE).round().long()
        ordered = steps.gather(-1, order)
        before = (ordered.cumsum(-1) - ordered).gather(-1, rank)
        marks = before < -int(-sought.number * WHOLE // 1)
    else:
        marks = rank < (blocks if sought.by_share else sought.number)
    marks &= ranked > float("-inf")
    return marks if own is None else marks | (torch.arange(blocks) == own.unsqueeze(1))


def unpacked(words: Tensor, rows: int, q_block: int) -> Tensor:
    """Words (B, H, W, K) as booleans (B, H, rows, K)."""
    per_word = 1
    while per_word * 2 * q_block <= 64:
        per_word *= 2
    row = torch.arange(rows)
    return (words[:, :, row // per_word] >> (row % per_word).view(-1, 1) & 1).bool()


@kind("pool", 5)
def pooled(draw: Draw) -> None:
    """Means of blocks of tokens."""
    block, dtype = draw.one((1, 2, 3, 7, 8, 16, 64, 100)), draw.one(DTYPES)
    x = draw.tensor(draw.batch(), draw.whole(1, 3), draw.length(), draw.dim(70), dtype=dtype, contents=draw.contents())
    lead = draw.whole(0, block - 1)

    def means(x: Tensor) -> list[Tensor]:
        number = torch.arange(lead, lead + x.shape[2]) // block
        count = -(-(lead + x.shape[2]) // block)
        onto = (torch.arange(count).unsqueeze(1) == number).to(x.dtype)
        return [onto @ x / onto.sum(1, keepdim=True).clamp_min(1)]

    with anything(draw):
        found = pool(draw.placed(x), block, lead=lead)
    low = torch.promote_types(dtype, torch.float32)
    demand(found.dtype == low, f"means of {dtype} are {found.dtype}")
    if x.shape[2]:
        Judge(means, [x], low, lambda x: means(x.abs()), ulps=16)(["means"], [found])
