"""Where a mechanism looks inside a model, while the model attends exactly."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from foveate.attention import Bias, Weights, attend, attend_partial
from foveate.lab.results import Looked
from foveate.mixers.core import joined
from foveate.patterns import Layout, Pattern, Selection, full
from foveate.patterns.selection import FULL, unpack_bits

CELLS = 64  # the picture has at most this many rows


class Looks:
    """A core that attends exactly and notes what share of that attention falls on the pattern in question."""

    pattern = full

    def __init__(self, asked: Pattern) -> None:
        self.asked = asked
        self.mass: list[float] = []
        self.visible: list[float] = []
        self.computed: list[float] = []
        self.seen: Tensor | None = None  # pairs per cell, over all layers
        self.all: Tensor | None = None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        within: Pattern = full,
        bias: Tensor | Bias | None = None,
        weights: Weights | str = "softmax",
        scale: float | None = None,
        softcap: float | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        asked = joined(self.asked, within)
        whole = attend_partial(q, k, v, within, bias=bias, scale=scale, softcap=softcap, layout=layout)
        part = attend_partial(q, k, v, asked, bias=bias, scale=scale, softcap=softcap, layout=layout)
        assert whole.lse is not None and part.lse is not None
        self.mass.append(float(torch.exp(part.lse - whole.lse).mean()))
        self._compare(asked.select(q, k, layout, scale=scale), within.select(q, k, layout, scale=scale))
        tile = picture_tile(q.shape[2])
        self._paint(
            asked.select(q, k, layout, tile=tile, scale=scale), within.select(q, k, layout, tile=tile, scale=scale)
        )
        if weights == "softmax":
            return whole.out
        return attend(q, k, v, within, bias=bias, weights=weights, scale=scale, softcap=softcap, layout=layout)

    def _compare(self, asked: Selection, allowed: Selection) -> None:
        self.visible.append(asked.density / allowed.density)
        self.computed.append(asked.computed / allowed.computed)

    def _paint(self, asked: Selection, allowed: Selection) -> None:
        seen, all_ = pairs_per_tile(asked), pairs_per_tile(allowed)
        self.seen = seen if self.seen is None else self.seen + seen
        self.all = all_ if self.all is None else self.all + all_

    def result(self) -> Looked:
        """Averages over layers; ValueError where the model never attended."""
        if self.seen is None or self.all is None:
            raise ValueError("this model's attention does not go through transformers' attention functions")
        mass, visible, computed = map(statistics.fmean, (self.mass, self.visible, self.computed))
        return Looked(mass, visible, computed, draw(self.seen, self.all))


def picture_tile(length: int) -> int:
    """Side of a picture's cell in tokens: a multiple of 8 that makes at most CELLS rows."""
    return max(8, -(-length // CELLS // 8) * 8)


def pairs_per_tile(selection: Selection) -> Tensor:
    """Visible pairs in each tile, averaged over batch entries and heads, (query tiles, key tiles)."""
    tile, rows, columns = selection.tile, selection.num_q_tiles, selection.num_k_tiles
    counts = torch.zeros(selection.num_rows * columns, dtype=torch.double)
    in_masks = selection.unpacked_masks.flatten(1).sum(1).double()
    queries = (selection.num_queries - torch.arange(rows) * tile).clamp(max=tile).double()
    full_pairs = queries[selection.tile_rows % rows] * tile
    in_tiles = torch.where(
        selection.mask_ids == FULL, full_pairs, torch.cat([in_masks, in_masks.new_zeros(1)])[selection.mask_ids.long()]
    )
    counts.index_add_(0, selection.tile_rows * columns + selection.tile_ids.long(), in_tiles)
    in_columns = unpack_bits(selection.column_masks).sum(1).double()
    counts.index_add_(0, selection.column_rows * columns + selection.column_ids.long() // tile, in_columns)
    return counts.view(-1, rows, columns).mean(0)


def draw(seen: Tensor, all_: Tensor) -> list[str]:
    """One character per cell: "." where nothing can be seen, else the share seen from 0 (none) to 9 (all)."""
    share = torch.where(all_ > 0, seen / all_.clamp_min(1), -1.0)
    digits = torch.where(share > 0, (share * 9).round().clamp(1, 9), share).int()
    return ["".join("." if cell < 0 else str(cell) for cell in row) for row in digits.tolist()]
