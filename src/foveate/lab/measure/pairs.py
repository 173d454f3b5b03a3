"""A picture of the pairs that a mechanism sees, over the whole of a text."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.patterns import Selection
from foveate.patterns.select.selection import FULL, unpack_bits

CELLS = 64  # the picture has at most this many rows


class Picture:
    """Pairs seen and pairs there are in each cell, added up over the layers that look at the longest text."""

    def __init__(self) -> None:
        self._pairs = 0
        self._seen: Tensor | None = None
        self._all: Tensor | None = None

    @staticmethod
    def tile(length: int) -> int:
        """Side of a cell in tokens: a multiple of 8 that makes at most CELLS rows."""
        return max(8, -(-length // CELLS // 8) * 8)

    def add(self, seen: Selection, all_: Selection) -> None:
        """Count one layer, whose selections have tiles of a cell's size."""
        pairs = seen.num_queries * seen.num_keys
        if pairs < self._pairs:  # an encoder reads more than its decoder
            return
        ours, theirs = pairs_per_tile(seen), pairs_per_tile(all_)
        if self._seen is None or self._all is None or pairs > self._pairs:
            self._seen, self._all, self._pairs = ours, theirs, pairs
        else:
            self._seen, self._all = self._seen + ours, self._all + theirs

    def draw(self) -> list[str]:
        assert self._seen is not None and self._all is not None
        return draw(self._seen, self._all)


def pairs_per_tile(selection: Selection) -> Tensor:
    """Visible pairs in each tile, averaged over batch entries and heads, (query tiles, key tiles)."""
    rows, columns = selection.num_q_tiles, selection.num_k_tiles
    counts = torch.zeros(selection.num_rows * columns, dtype=torch.double)
    counts.index_add_(0, selection.tile_rows * columns + selection.tile_ids.long(), _pairs_in_tiles(selection))
    of_columns = selection.column_rows * columns + selection.column_ids.long() // selection.tile
    counts.index_add_(0, of_columns, unpack_bits(selection.column_masks).sum(1).double())
    return counts.view(-1, rows, columns).mean(0)


def _pairs_in_tiles(selection: Selection) -> Tensor:
    """Visible pairs in each listed tile, (T,)."""
    tile, rows = selection.tile, selection.num_q_tiles
    in_masks = torch.cat([selection.unpacked_masks.flatten(1).sum(1), torch.zeros(1)]).double()
    queries = (selection.num_queries - torch.arange(rows) * tile).clamp(max=tile).double()
    in_full = queries[selection.tile_rows % rows] * tile
    return torch.where(selection.mask_ids == FULL, in_full, in_masks[selection.mask_ids.long()])


def draw(seen: Tensor, all_: Tensor) -> list[str]:
    """One character per cell: "." where nothing can be seen, else the share seen from 0 (none) to 9 (all)."""
    share = torch.where(all_ > 0, seen / all_.clamp_min(1e-9), -1.0)
    digits = torch.where(share > 0, (share * 9).round().clamp(1, 9), share).int()
    return ["".join("." if cell < 0 else str(cell) for cell in row) for row in digits.tolist()]
