"""What a dynamic pattern becomes once it has looked at q and k: leaves that hold a decision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.patterns.algebra import Bounds, Boxes, Index, Interval, Pattern, mix_hash
from foveate.patterns.rules.bits import WORD, Cells, low_bits, own, pack_words, whole

MOST_WORDS = 16  # a box over more words than this gets a signature of its own


class Decided(Pattern):
    """Base of the leaves: a table whose first dims are the batch entries and heads it tells apart."""

    table: Tensor  # (B, H, ...)
    depends_on = "slot"

    @property
    def batches(self) -> int:  # type: ignore[override]
        return self.table.shape[0]

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.table.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.table,)

    def read(self, batch: Index, head: Index, *place: Tensor) -> Tensor:
        return self.table[(*own(batch, head, self.table), *place)]


@dataclass(frozen=True, eq=False, repr=False)
class BlockTable(Decided):
    """A bit for each row of ``q_block`` queries and each block of ``k_block`` keys."""

    table: Tensor  # (B, H, W, K) int64: bit r of word w is row w * rows_per_word + r
    num_rows: int
    q_block: int
    k_block: int
    q_start: int  # position of the first query of row 0

    text = "block_table(...)"

    def spread(self, heads: int) -> Pattern:
        return replace(self, table=self.table.repeat_interleave(heads // self.heads, 1))

    @property
    def rows_per_word(self) -> int:
        return rows_per_word(self.q_block)

    @cached_property
    def cells(self) -> Cells:
        """One for each word."""
        first = torch.arange(self.table.shape[2], device=self.table.device) * self.rows_per_word
        filled = low_bits((self.num_rows - first).clamp(max=self.rows_per_word)).unsqueeze(1)
        return Cells.of(self.table != 0, self.table == filled)

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        row, block = collapse(self._row(q)), collapse(self._block(k))
        word = self.read(batch, head, row // self.rows_per_word, block)
        seen = (word >> row % self.rows_per_word & 1).bool()
        return seen.expand(torch.broadcast_shapes(seen.shape, q.shape, k.shape))

    def bounds(self, boxes: Boxes) -> Bounds:
        at = self._words(boxes.position)
        some, every = self.cells.bounds(boxes.batch, boxes.head, at)
        first, last = self._row(boxes.position.q_lo), self._row(boxes.position.q_hi)
        wanted = low_bits(last - first + 1)
        bits = self.read(boxes.batch, boxes.head, at.q_lo, at.k_lo) >> first % self.rows_per_word & wanted
        one_word = (at.q_lo == at.q_hi) & (at.k_lo == at.k_hi)
        return Bounds(torch.where(one_word, bits != 0, some), torch.where(one_word, bits == wanted, every))

    def signature(self, boxes: Boxes) -> Tensor:
        """The words that a box touches, and where in them it begins."""
        at = self._words(boxes.position)
        high, wide = _most(at.q_hi - at.q_lo) + 1, _most(at.k_hi - at.k_lo) + 1
        if high * wide > MOST_WORDS:
            return super().signature(boxes)
        into_word = (boxes.position.q_lo - self.q_start) % (self.rows_per_word * self.q_block)
        signature = mix_hash(into_word, boxes.position.k_lo % self.k_block)
        for down, right in product(range(high), range(wide)):
            place = torch.minimum(at.q_lo + down, at.q_hi), torch.minimum(at.k_lo + right, at.k_hi)
            signature = mix_hash(signature, self.read(boxes.batch, boxes.head, *place))
        return signature

    def _row(self, q: Tensor) -> Tensor:
        return ((q - self.q_start) // self.q_block).clamp(0, self.table.shape[2] * self.rows_per_word - 1)

    def _block(self, k: Tensor) -> Tensor:
        return (k // self.k_block).clamp(0, self.table.shape[3] - 1)

    def _words(self, at: Interval) -> Interval:
        first, last = (self._row(edge) // self.rows_per_word for edge in (at.q_lo, at.q_hi))
        return Interval(first, last, self._block(at.k_lo), self._block(at.k_hi))


def rows_per_word(q_block: int) -> int:
    """Rows of a block table under one word: a power of two, of at most 64 query positions."""
    return 1 << max((WORD // q_block).bit_length() - 1, 0)


def pack_rows(chosen: Tensor, q_block: int) -> Tensor:
    """Booleans (..., rows, columns) as words (..., W, columns), the rows of a word in its bits."""
    rows = rows_per_word(q_block)
    if rows < 8:
        by_column = whole(chosen.transpose(-1, -2), rows)
        return pack_words(by_column.unflatten(-1, (-1, rows))).squeeze(-1).transpose(-1, -2)
    missing = -chosen.shape[-2] % rows
    eights = (pad(chosen, (0, 0, 0, missing)) if missing else chosen).view(torch.uint8).unflatten(-2, (-1, 8))
    octets = eights[..., 0, :]
    for bit in range(1, 8):  # row by row: to turn the whole table first was measured twenty times slower
        octets = octets | eights[..., bit, :] << bit
    by_word = octets.unflatten(-2, (-1, rows // 8)).transpose(-1, -2)  # (..., W, columns, rows / 8)
    return whole(by_word, 8).reshape(-1).view(torch.int64).view(by_word.shape[:-1])


def no_rows(batches: int, heads: int, num_rows: int, num_blocks: int, *, q_block: int, device: torch.device) -> Tensor:
    """The words of rows that chose nothing yet."""
    num_words = -(-num_rows // rows_per_word(q_block))
    return torch.zeros(batches, heads, num_words, num_blocks, dtype=torch.long, device=device)


def words_of(words: Tensor, rows: slice, q_block: int) -> Tensor:
    """The words of consecutive rows, the first of which begins a word."""
    per_word = rows_per_word(q_block)
    assert rows.start % per_word == 0
    return words[:, :, rows.start // per_word : -(-rows.stop // per_word)]


def block_table(words: Tensor, num_rows: int, *, q_block: int, k_block: int, q_start: int = 0) -> BlockTable:
    """The pattern of packed rows (see :func:`pack_rows`); ``num_rows`` of their bits are rows."""
    return BlockTable(words, num_rows, q_block, k_block, q_start)


@dataclass(frozen=True, eq=False, repr=False)
class Line(Decided):
    """Marks along one number of a pair, with their running count."""

    table: Tensor  # (B, H, M) bool
    before: Tensor  # (B, H, M + 1): marks before each entry

    @classmethod
    def of(cls, marks: Tensor) -> Line:
        return cls(marks, pad(marks.cumsum(2), (1, 0)))

    def marked(self, batch: Index, head: Index, at: Tensor) -> Tensor:
        last = self.table.shape[2] - 1
        return self.read(batch, head, at.clamp(0, last)) & (at >= 0) & (at <= last)

    def between(self, boxes: Boxes, low: Tensor, high: Tensor) -> Bounds:
        """Whether some and whether every entry from low to high, both included, is marked."""
        row = own(boxes.batch, boxes.head, self.before)
        first, end = (edge.clamp(0, self.table.shape[2]) for edge in (low, high + 1))
        marked = self.before[(*row, end)] - self.before[(*row, first)]
        return Bounds(some=marked > 0, every=marked == high - low + 1)


class Columns(Line):
    """Keys that every query of a head sees."""

    text = "columns(...)"

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        seen = self.marked(batch, head, k)
        return seen.expand(torch.broadcast_shapes(seen.shape, q.shape))

    def bounds(self, boxes: Boxes) -> Bounds:
        return self.between(boxes, boxes.position.k_lo, boxes.position.k_hi)

    def signature(self, boxes: Boxes) -> Tensor:
        return mix_hash(boxes.batch, boxes.head, boxes.position.k_lo)


class Distances(Line):
    """Distances back from the query at which a head sees a key."""

    text = "distances(...)"
    sees_future = False

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return self.marked(batch, head, q - k)

    def bounds(self, boxes: Boxes) -> Bounds:
        at = boxes.position
        return self.between(boxes, at.q_lo - at.k_hi, at.q_hi - at.k_lo)

    def signature(self, boxes: Boxes) -> Tensor:
        return mix_hash(boxes.batch, boxes.head, boxes.position.q_lo - boxes.position.k_lo)


@dataclass(frozen=True, eq=False, repr=False)
class ChunkTable(Decided):
    """Keys in an order of their chunks, as many as the budget; the own chunk counts as far as a query sees of it.

    An entry of the table is twice the number of keys in other chunks that come before this chunk, plus 1 if the own
    chunk does.
    """

    table: Tensor  # (B, H, C, C) int64
    number: Tensor  # (B, M): the chunk of each key, and of the query that stands there
    budget: int

    text = "chunk_table(...)"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.table, self.number)

    @cached_property
    def inside(self) -> Tensor:
        """The place (B, M) of each key in its chunk."""
        at = torch.arange(self.number.shape[1], device=self.number.device)
        begins = pad(self.number.diff(dim=1) != 0, (1, 0), value=True)
        return at - torch.where(begins, at, 0).cummax(1).values

    @cached_property
    def cells(self) -> Cells:
        lengths = torch.zeros_like(self.table[:, 0, 0]).scatter_add_(1, self.number, torch.ones_like(self.number))
        some = self._rank(self.table, 0, 0) < self.budget
        own, other = (lengths[:, None, :, None] - 1, lengths[:, None, None] - 1)
        return Cells.of(some, self._rank(self.table, own, other) < self.budget)

    @staticmethod
    def _rank(entry: Tensor, q_inside: Tensor | int, k_inside: Tensor | int) -> Tensor:
        """How many keys come before one at a place in its chunk, for a query at a place in its own."""
        return entry // 2 + k_inside + entry % 2 * (q_inside + 1)

    def _at(self, tensor: Tensor, batch: Index, position: Tensor) -> Tensor:
        row = batch if len(tensor) > 1 else 0
        return tensor[row, position.clamp(0, tensor.shape[1] - 1)]

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        rows, columns = self._at(self.number, batch, q), self._at(self.number, batch, k)
        q_inside, k_inside = self._at(self.inside, batch, q), self._at(self.inside, batch, k)
        seen = self._rank(self.read(batch, head, rows, columns), q_inside, k_inside) < self.budget
        return seen.expand(torch.broadcast_shapes(seen.shape, q.shape, k.shape))

    def bounds(self, boxes: Boxes) -> Bounds:
        at = Interval(*(self._at(self.number, boxes.batch, edge) for edge in boxes.position))
        some, every = self.cells.bounds(boxes.batch, boxes.head, at)
        entry = self.read(boxes.batch, boxes.head, at.q_lo, at.k_lo)
        one = (at.q_lo == at.q_hi) & (at.k_lo == at.k_hi)
        inside = Interval(*(self._at(self.inside, boxes.batch, edge) for edge in boxes.position))
        first = self._rank(entry, inside.q_lo, inside.k_lo) < self.budget
        last = self._rank(entry, inside.q_hi, inside.k_hi) < self.budget
        return Bounds(torch.where(one, first, some), torch.where(one, last, every))


class Picks(NamedTuple):
    """The words of 64 keys in which queries chose any, ascending by code."""

    codes: Tensor  # (C,) int64: ((query * B + batch) * H + head) * W + word
    words: Tensor  # (C,) int64: bit b is key 64 * word + b
    some: Tensor  # (B, H, ceil(n / 64), W): cells of 64 queries and 64 keys
    every: Tensor


def pick(chosen: Tensor, first_row: int) -> Picks:
    """The keys chosen (B, H, n, M) by the queries from ``first_row`` on; n is 64 m but for the last ones."""
    words = pack_words(chosen.permute(2, 0, 1, 3))  # (n, B, H, W)
    codes = torch.nonzero(words.flatten()).squeeze(1)
    first_key = torch.arange(words.shape[-1], device=words.device) * WORD
    filled = words == low_bits((chosen.shape[-1] - first_key).clamp(max=WORD))
    some, every = _cells(words != 0, False).any(3), _cells(filled, True).all(3)
    return Picks(codes + first_row * words.shape[1:].numel(), words.flatten()[codes], some, every)


def _cells(cells: Tensor, beyond: bool) -> Tensor:
    """(n, B, H, W) as (B, H, ceil(n / 64), 64, W)."""
    return pad(cells.permute(1, 2, 0, 3), (0, 0, 0, -cells.shape[0] % WORD), value=beyond).unflatten(2, (-1, WORD))


def joined(picks: list[Picks], num_queries: int, *, q_start: int = 0) -> Picked:
    """The pattern of consecutive picks."""
    codes, words, some, every = zip(*picks, strict=True)
    batches, heads, _, num_words = some[0].shape
    shape = (batches, heads, num_queries, num_words)
    cells = Cells.of(torch.cat(some, dim=2), torch.cat(every, dim=2))
    return Picked(torch.cat(codes), torch.cat(words), cells, shape, q_start)


@dataclass(frozen=True, eq=False, repr=False)
class Picked(Pattern):
    """Single keys of single queries: the words of :class:`Picks`, found by their codes."""

    codes: Tensor
    words: Tensor
    cells: Cells
    shape: tuple[int, int, int, int]  # B, H, N, W
    q_start: int  # position of query 0

    text = "picked(...)"
    depends_on = "slot"

    @property
    def batches(self) -> int:  # type: ignore[override]
        return self.shape[0]

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.codes, self.words)

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        batches, heads, _, num_words = self.shape
        batch, head = own(batch, head, self.cells.some)
        row = ((q - self.q_start) * batches + batch) * heads + head
        seen = (self._word(row * num_words + collapse(k // WORD)) >> k % WORD & 1).bool()
        return seen.expand(torch.broadcast_shapes(seen.shape, q.shape, k.shape))

    def _word(self, code: Tensor) -> Tensor:
        if self.codes.numel() == 0:
            return torch.zeros_like(code)
        entry = torch.searchsorted(self.codes, code.contiguous()).clamp_max(self.codes.numel() - 1)
        return torch.where(self.codes[entry] == code, self.words[entry], 0)

    def bounds(self, boxes: Boxes) -> Bounds:
        at, (_, _, num_queries, num_words) = boxes.position, self.shape
        last_row, last_word = max(num_queries - 1, 0) // WORD, max(num_words - 1, 0)
        rows = (((edge - self.q_start) // WORD).clamp(0, last_row) for edge in (at.q_lo, at.q_hi))
        words = ((edge // WORD).clamp(0, last_word) for edge in (at.k_lo, at.k_hi))
        return self.cells.bounds(boxes.batch, boxes.head, Interval(*rows, *words))


def collapse(index: Tensor) -> Tensor:
    """An index kept to one entry along the last two dims where all are equal, to read a table just once."""
    for dim in range(1, min(index.dim(), 2) + 1):
        first = index.narrow(-dim, 0, min(index.shape[-dim], 1))
        if index.shape[-dim] > 1 and bool((index == first).all()):
            index = first
    return index


def _most(values: Tensor) -> int:
    return int(values.max()) if values.numel() else 0
