"""How tiles are gathered and batched: a row is a query tile of every head that shares its keys and values.

All tensors here are in slot order: q (B, H, N', D), k (B, G, M', D), lengths padded to whole tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from foveate.patterns.select.selection import FULL, Selection, natural_positions, unpack_bits

BUDGET = 2**20  # logits computed at a time: 4 MB of float32, near enough to the cache
WASTE = 0.75  # rows with fewer keys than this share of the longest do not join its batch


@dataclass(frozen=True)
class Sharing:
    """Which heads share a row: S sets of ``fold`` query heads with one key head, value head and selection head."""

    batch: int
    sets: int  # S
    fold: int
    key_heads: int
    value_heads: int

    @staticmethod
    def of(heads: int, q: Tensor, k: Tensor, v: Tensor) -> Sharing:
        sets = math.lcm(heads, k.shape[1], v.shape[1])
        return Sharing(q.shape[0], sets, q.shape[1] // sets, k.shape[1], v.shape[1])


@dataclass(frozen=True)
class Batch:
    """Rows computed together. Keys come as tiles and single columns; logits are (R, fold, tile, L * tile + C)."""

    rows: Tensor  # (R,)
    batch: Tensor  # (R,) batch entry
    head_set: Tensor  # (R,)
    q_tile: Tensor  # (R,)
    tiles: Tensor  # (R, L) key tiles
    columns: Tensor  # (R, C) key slots
    hidden_tiles: Tensor  # (R, tile, P * tile) bool: what the first P tiles hide
    hidden_columns: Tensor  # (R, tile, C) bool


class Rows:
    """The rows of a selection for given heads, in batches of similar size."""

    def __init__(self, selection: Selection, sharing: Sharing) -> None:
        self.selection, self.sharing = selection, sharing
        self.tile = selection.tile
        self.num_rows = sharing.batch * sharing.sets * selection.num_q_tiles

    @cached_property
    def place(self) -> tuple[Tensor, Tensor, Tensor]:
        """Batch entry, head set and query tile of each row."""
        row = torch.arange(self.num_rows, device=self.selection.tile_ids.device)
        tiles, sets = self.selection.num_q_tiles, self.sharing.sets
        return row // (tiles * sets), row // tiles % sets, row % tiles

    @cached_property
    def list_of(self) -> Tensor:
        """The selection's row that lists each row's keys."""
        chosen, (batch, head_set, q_tile) = self.selection, self.place
        head = head_set // (self.sharing.sets // chosen.heads)
        entry = batch if chosen.batches > 1 else torch.zeros_like(batch)
        return (entry * chosen.heads + head) * chosen.num_q_tiles + q_tile

    @cached_property
    def hidden(self) -> Tensor:
        """Hidden pairs of each distinct mask, then of an absent tile (all), then of a full tile (none)."""
        masks = ~self.selection.unpacked_masks
        absent = masks.new_ones(1, self.tile, self.tile)
        return torch.cat([masks, absent, ~absent])

    def batches(self) -> Iterator[Batch]:
        """Rows with any key, longest lists first, in batches of about BUDGET logits."""
        num_tiles = self.selection.tile_starts.diff()[self.list_of]
        num_columns = self.selection.column_starts.diff()[self.list_of]
        size = num_tiles * self.tile + num_columns
        order = torch.argsort(size, descending=True, stable=True)
        order = order[: int((size > 0).sum())]
        sizes = size[order].tolist()
        start = 0
        while start < len(sizes):
            most = max(1, BUDGET // (sizes[start] * self.sharing.fold * self.tile))
            end = start + 1
            while end < min(start + most, len(sizes)) and sizes[end] >= WASTE * sizes[start]:
                end += 1
            yield from self._segments(order[start:end], num_tiles, num_columns)
            start = end

    def _segments(self, rows: Tensor, num_tiles: Tensor, num_columns: Tensor) -> Iterator[Batch]:
        """The keys of some rows, cut where even one batch of them would be too large; the last has the columns."""
        listed = self.list_of[rows]
        longest = int(num_tiles[rows].max())
        step = max(1, BUDGET // (rows.numel() * self.sharing.fold * self.tile**2))
        cuts = list(range(0, longest, step)) or [0]
        for first in cuts:
            last = first == cuts[-1]
            width = int(num_columns[rows].max()) if last else 0
            yield self._gather(rows, listed, first, min(first + step, longest), width)

    def _gather(self, rows: Tensor, listed: Tensor, first: int, end: int, width: int) -> Batch:
        tiles, numbers = self._tiles(listed, first, end)
        full = self.hidden.shape[0] - 1
        maskless = (numbers == full).all(0)
        masked = int(torch.nonzero(~maskless).max()) + 1 if not bool(maskless.all()) else 0
        hidden = self.hidden.index_select(0, numbers[:, :masked].flatten())
        hidden = hidden.view(rows.numel(), masked, self.tile, self.tile).transpose(1, 2).flatten(2)
        columns, hidden_columns = self._columns(listed, width)
        batch, head_set, q_tile = (part[rows] for part in self.place)
        return Batch(rows, batch, head_set, q_tile, tiles, columns, hidden, hidden_columns)

    def _tiles(self, listed: Tensor, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Key tiles first..end of each list, and the row of ``hidden`` that says what each hides."""
        chosen = self.selection
        absent, full = self.hidden.shape[0] - 2, self.hidden.shape[0] - 1
        if chosen.num_tiles == 0 or first == end:
            empty = listed.new_empty(listed.numel(), 0)
            return empty, empty
        at, exists = _entries(chosen.tile_starts, listed, first, end)
        numbers = chosen.mask_ids[at].long()
        numbers = torch.where(numbers == FULL, full, numbers)
        return chosen.tile_ids[at].long(), torch.where(exists, numbers, absent)

    def _columns(self, listed: Tensor, width: int) -> tuple[Tensor, Tensor]:
        chosen = self.selection
        if width == 0:
            empty = listed.new_empty(listed.numel(), 0)
            return empty, empty.new_empty(listed.numel(), self.tile, 0, dtype=torch.bool)
        at, exists = _entries(chosen.column_starts, listed, 0, width)
        seen = unpack_bits(chosen.column_masks[at]) & exists.unsqueeze(-1)  # (R, C, tile)
        return chosen.column_ids[at].long(), ~seen.transpose(1, 2)


def _entries(starts: Tensor, listed: Tensor, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Where entries first..end of each list stand (clamped), and whether they exist; (R, end - first)."""
    at = starts[listed].unsqueeze(1) + torch.arange(first, end, device=starts.device)
    exists = at < starts[listed + 1].unsqueeze(1)
    return torch.where(exists, at, 0), exists


class Slotted:
    """Tensors (B, heads, length, dim) in slot order, and back."""

    def __init__(self, slots: Tensor | None, length: int, tile: int) -> None:
        self.slots, self.length = slots, length
        self.padding = -length % tile

    def into(self, x: Tensor) -> Tensor:
        """In slot order, padded to whole tiles; empty slots hold zeros."""
        if self.slots is not None:
            return x[:, :, self.slots.clamp_min(0)].masked_fill((self.slots < 0).view(-1, 1), 0)
        return torch.nn.functional.pad(x, (0, 0, 0, self.padding)) if self.padding else x

    def back(self, x: Tensor) -> Tensor:
        """Back in token order."""
        if self.slots is not None:
            return x[:, :, natural_positions(self.slots, self.length, x.device)]
        return x[:, :, : self.length]

    def positions(self, tiles: Tensor, tile: int) -> Tensor:
        """Token at each slot of the given tiles, (..., tile); empty slots say token 0."""
        return self.tokens(tiles.unsqueeze(-1) * tile + torch.arange(tile, device=tiles.device))

    def tokens(self, slots: Tensor) -> Tensor:
        if self.slots is not None:
            return self.slots[slots].clamp_min(0)
        return slots.clamp_max(self.length - 1)


def add_rows(total: Tensor, index: Tensor, source: Tensor) -> None:
    """``total[index] += source`` over rows, repeated ones included.

    As sorted bags: on CPU, index_add_ over wide rows was measured 100 times slower than embedding_bag.
    """
    order = torch.argsort(index)
    target, counts = torch.unique_consecutive(index[order], return_counts=True)
    first = torch.nn.functional.pad(counts.cumsum(0), (1, 0))[:-1]
    total[target] += torch.nn.functional.embedding_bag(order, source, first, mode="sum")
