"""Decisions as bits, 64 to a word, and counts from which what holds for a whole box of them is read off."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.patterns.algebra import Bounds, Index, Interval

WORD = 64  # bits


def pack_words(bits: Tensor) -> Tensor:
    """Booleans (..., n) as int64 words (..., ceil(n / 64)); bit b of a word is entry 64 * word + b.

    Eight booleans are read as one integer, whose highest byte a multiplication fills with their lowest bits.
    """
    if bits.numel() == 0:
        return bits.new_zeros((*bits.shape[:-1], -(-bits.shape[-1] // WORD)), dtype=torch.int64)
    eights = whole(bits, 8).contiguous().view(torch.uint8).view(torch.int64)
    octets = (eights * 0x0102040810204080 >> 56).to(torch.uint8)
    return whole(octets, 8).view(torch.int64)


def whole(x: Tensor, multiple: int) -> Tensor:
    """Zeros after the last dim, up to a multiple."""
    missing = -x.shape[-1] % multiple
    return pad(x, (0, missing)) if missing else x


def low_bits(count: Tensor) -> Tensor:
    """Words with the lowest ``count`` bits set, 1 to 64 (a shift by 64 leaves no bit at all)."""
    return (2 << (count - 1)) - 1


class Cells(NamedTuple):
    """How many cells with some, and with every, pair chosen lie above and left of each corner."""

    some: Tensor  # (B, H, rows + 1, columns + 1) int32
    every: Tensor

    @classmethod
    def of(cls, some: Tensor, every: Tensor) -> Cells:
        """From booleans (B, H, rows, columns)."""
        return cls(_corners(some), _corners(every))

    def bounds(self, batch: Tensor, head: Tensor, at: Interval) -> Bounds:
        """Of boxes of cells, from their first and last row (q) and column (k)."""
        area = (at.q_hi - at.q_lo + 1) * (at.k_hi - at.k_lo + 1)
        some, every = (_between(corners, batch, head, at) for corners in self)
        return Bounds(some=some > 0, every=every == area)


def _corners(cells: Tensor) -> Tensor:
    return pad(cells.cumsum(2, dtype=torch.int32).cumsum(3, dtype=torch.int32), (1, 0, 1, 0))


def _between(corners: Tensor, batch: Tensor, head: Tensor, at: Interval) -> Tensor:
    def read(q: Tensor, k: Tensor) -> Tensor:
        return corners[(*own(batch, head, corners), q, k)]

    upper = read(at.q_lo, at.k_hi + 1) - read(at.q_lo, at.k_lo)
    return read(at.q_hi + 1, at.k_hi + 1) - read(at.q_hi + 1, at.k_lo) - upper


def own(batch: Index, head: Index, table: Tensor) -> tuple[Index, Index]:
    """Batch entry and head in a table (B, H, ...) that may hold one for all of them."""
    return (batch if table.shape[0] > 1 else 0), (head if table.shape[1] > 1 else 0)
