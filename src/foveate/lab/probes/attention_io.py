"""How many numbers exact attention moves between a small fast memory and a large slow one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from foveate.catalogue.contracts import Finding
from foveate.catalogue.tiers import probe
from foveate.lab.probes.picture import Curve, curves

Algorithm = Literal["flash", "blocked"]


class Tiles(NamedTuple):
    """Which algorithm, and its tiles: rows of queries by rows of keys ("flash"), or squares of a side ("blocked")."""

    algorithm: Algorithm
    rows: int
    columns: int


@dataclass
class Memory:
    """A fast memory of so many numbers, and counts of what is read from and written to the slow one."""

    size: int
    read: int = 0
    written: int = 0

    def load(self, x: Tensor) -> Tensor:
        self.read += x.numel()
        return x.clone()

    def store(self, to: Tensor, x: Tensor) -> None:
        self.written += x.numel()
        to.copy_(x)

    def holds(self, *numbers: int) -> None:
        """Refuse what does not fit into the fast memory at once."""
        if sum(numbers) > self.size:
            raise ValueError(f"{sum(numbers)} numbers do not fit into a fast memory of {self.size}")

    @property
    def accesses(self) -> int:
        return self.read + self.written


def accesses(tokens: int, dim: int, tiles: Tiles) -> int:
    """The model: numbers that attention of one head moves, (N, d) queries, keys and values, with these tiles.

    FlashAttention reads keys and values once for every tile of queries: about 4 N² d² / M with rows of M / 2 d. Blocked
    products write the (N, N) logits, and read them again for each block of output channels: about 4 √3 N² d / √M with
    sides of √(M / 3).

    >>> accesses(64, 4, Tiles("flash", 16, 16))
    2560
    """
    rows = math.ceil(tokens / tiles.rows)
    if tiles.algorithm == "flash":
        return 2 * tokens * dim + rows * 2 * tokens * dim
    across = math.ceil(dim / tiles.rows)
    products = rows * 2 * tokens * dim  # queries by blocks for every block of keys, and keys for every block of queries
    logits = tokens * tokens * (1 + across)  # written once, read for every block of output channels
    values = rows * tokens * dim + tokens * dim  # for every block of queries; and the output
    sums = 2 * tokens * (1 + across)  # maximum and sum of each row, written and read
    return products + logits + values + sums


def choose_tiles(tokens: int, dim: int, memory: int) -> Tiles:
    """The tiles of least cost, by the model, that fit a fast memory of so many numbers.

    >>> choose_tiles(256, 8, 1024).algorithm, choose_tiles(256, 32, 200).algorithm
    ('flash', 'blocked')

    Raises ValueError for a memory that is too small for any.
    """
    found = []
    for columns in {1, *(2**power for power in range(tokens.bit_length()))}:
        rows = min(tokens, (memory - 2 * columns * dim) // (2 * dim + columns + 2))
        if rows >= 1 and columns <= tokens:
            found.append(Tiles("flash", rows, columns))
    side = (math.isqrt(36 + 12 * memory) - 6) // 6  # three squares and two rows' maxima and sums: 3 s² + 6 s <= M
    if side >= 1:
        found.append(Tiles("blocked", min(side, tokens), min(side, tokens)))
    if not found:
        raise ValueError(f"a fast memory of {memory} numbers is too small for one row of {dim} channels")
    return min(found, key=lambda tiles: (accesses(tokens, dim, tiles), tiles.algorithm, -tiles.columns))


def attend_counted(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, memory: Memory) -> Tensor:
    """Softmax attention of one head, (N, d), that touches its inputs and outputs through a memory alone."""
    return (_flash if tiles.algorithm == "flash" else _blocked)(q, k, v, tiles, memory)


def _flash(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, memory: Memory) -> Tensor:
    (tokens, dim), out = q.shape, torch.empty_like(q)
    for first in range(0, tokens, tiles.rows):
        at = slice(first, first + tiles.rows)
        queries = memory.load(q[at])
        rows = len(queries)
        total, top = torch.zeros(rows, dtype=q.dtype), torch.full((rows,), -math.inf, dtype=q.dtype)
        read = torch.zeros_like(queries)
        for begin in range(0, tokens, tiles.columns):
            keys, values = (memory.load(x[begin : begin + tiles.columns]) for x in (k, v))
            memory.holds(2 * rows * dim, 2 * len(keys) * dim, rows * len(keys), 2 * rows)
            logits = queries @ keys.T / math.sqrt(dim)
            higher = torch.maximum(top, logits.amax(1))
            fade, weights = torch.exp(top - higher), torch.exp(logits - higher.unsqueeze(1))
            total, top = fade * total + weights.sum(1), higher
            read = fade.unsqueeze(1) * read + weights @ values
        memory.store(out[at], read / total.unsqueeze(1))
    return out


def _blocked(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, memory: Memory) -> Tensor:
    (tokens, dim), side = q.shape, tiles.rows
    table, sums, out = q.new_empty(tokens, tokens), q.new_empty(tokens, 2), torch.empty_like(q)
    for first in range(0, tokens, side):
        at = slice(first, min(first + side, tokens))
        rows = at.stop - at.start
        total, top = torch.zeros(rows, dtype=q.dtype), torch.full((rows,), -math.inf, dtype=q.dtype)
        for begin in range(0, tokens, side):
            logits = q.new_zeros(rows, min(side, tokens - begin))
            for channel in range(0, dim, side):
                parts = [memory.load(x[:, channel : channel + side]) for x in (q[at], k[begin : begin + side])]
                memory.holds(parts[0].numel(), parts[1].numel(), logits.numel(), 6 * rows)
                logits += parts[0] @ parts[1].T / math.sqrt(dim)
            higher = torch.maximum(top, logits.amax(1))
            total = torch.exp(top - higher) * total + torch.exp(logits - higher.unsqueeze(1)).sum(1)
            top = higher
            memory.store(table[at, begin : begin + side], logits)
        memory.store(sums[at], torch.stack([top, total], 1))
    for first in range(0, tokens, side):
        for channel in range(0, dim, side):
            top, total = memory.load(sums[first : first + side]).unbind(1)
            read = q.new_zeros(len(top), min(side, dim - channel))
            for begin in range(0, tokens, side):
                logits = memory.load(table[first : first + side, begin : begin + side])
                values = memory.load(v[begin : begin + side, channel : channel + side])
                memory.holds(logits.numel(), values.numel(), read.numel(), 2 * len(top))
                read += torch.exp(logits - top.unsqueeze(1)) / total.unsqueeze(1) @ values
            memory.store(out[first : first + side, channel : channel + side], read)
    return out


@probe(
    "attention_io",
    papers=("FlashAttention-IO-optimality",),
    tiny={"tokens": 48, "dim": 6, "memories": (14, 24, 72, 200, 600)},
)
def attention_io(
    seed: int = 0,
    *,
    tokens: int = 96,
    dim: int = 16,
    memories: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048),
) -> Finding:
    """Moves of exact attention fall as 1 / M where the fast memory M holds d² numbers, and as 1 / √M below.

    For each memory the tile chooser takes the algorithm and tiles that the cost model thinks least of, attention runs
    through a memory that counts what is loaded and stored (and refuses what does not fit), and the counts are set
    beside the model, and beside the bounds N² d² / M and N² d / √M. Confirmed where outputs are exact, counts equal the
    model, FlashAttention is chosen well above d² and blocked products well below, and counts divided by the bounds
    differ by less than a factor of 12 over all memories.

    Saha, Ye, The I/O Complexity of Attention, or How Optimal is Flash Attention?, arXiv 2402.07443.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, tokens, dim, generator=generator, dtype=torch.float64)
    exact = (q @ k.T / math.sqrt(dim)).softmax(-1) @ v
    counts, ratios, errors, right = [], [], [], True
    for size in memories:
        tiles, memory = choose_tiles(tokens, dim, size), Memory(size)
        out = attend_counted(q, k, v, tiles, memory)
        counts.append(memory.accesses)
        errors.append(abs(memory.accesses - accesses(tokens, dim, tiles)))
        ratios.append(memory.accesses / bound(tokens, dim, size))
        right = right and bool((out - exact).abs().max() < 1e-9)
        if size >= 4 * dim * dim or 4 * size <= dim * dim:
            right = right and (tiles.algorithm == "flash") == (size >= dim * dim)
    figures = {
        "least accesses over bound": min(ratios),
        "most accesses over bound": max(ratios),
        "greatest difference from the model": float(max(errors)),
    } | {f"accesses at {size}": float(count) for size, count in zip(memories, counts, strict=True)}
    bounds = [bound(tokens, dim, size) for size in memories]
    sides = [float(size) for size in memories]
    picture = curves(
        "numbers moved by exact attention, by the size of the fast memory",
        [Curve("counted", sides, [float(x) for x in counts]), Curve("bound", sides, bounds)],
        x="numbers in the fast memory (log)",
        y="numbers moved (log)",
        log=True,
    )
    confirmed = right and max(errors) == 0 and max(ratios) / min(ratios) < 12
    claim = "accesses are of order N² d² / M for M >= d², by online softmax, and N² d / √M below, by blocked products"
    return Finding(claim, confirmed, figures, picture)


def bound(tokens: int, dim: int, memory: int) -> float:
    """The order of the accesses that attention needs: N² d² / M from M = d² on, N² d / √M below, and its own size."""
    pairs = tokens * tokens
    least = pairs * dim * dim / memory if memory >= dim * dim else pairs * dim / math.sqrt(memory)
    return least + 4 * tokens * dim
