"""A dynamic pattern that chooses by chunks of unequal lengths, key by key up to a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from foveate.counts import whole_numbers
from foveate.patterns.algebra import Bounds, Boxes, Index, Interval, Pattern, Scene
from foveate.patterns.rules.bits import Cells
from foveate.patterns.rules.choice import PromptChoice, counted_from
from foveate.patterns.rules.choose import NEVER, score
from foveate.patterns.rules.decided import Decided
from foveate.patterns.rules.sequence import positive
from foveate.precision import to_accum


@dataclass(frozen=True, eq=False, repr=False)
class ChunkBudget(PromptChoice):
    keys: int
    chunk: int
    starts: tuple[int, ...] | None

    @property
    def text(self) -> str:  # type: ignore[override]
        how = f"chunk={self.chunk}" if self.starts is None else f"starts={list(self.starts)}"
        return f"chunk_budget({self.keys}, {how})"

    def chosen(self, q: Tensor, keys: Tensor, scene: Scene) -> Pattern:
        numbers = [self._chunks(keys[entry : entry + 1], scene.first) for entry in range(len(keys))]
        count = max(int(number[-1]) + 1 for number in numbers)
        tables = [
            self._taken(q[entry : entry + 1], keys[entry : entry + 1], number, count, scene)
            for entry, number in enumerate(numbers)
        ]
        table = ChunkTable(torch.cat(tables), torch.stack(numbers))
        return counted_from(scene.first, table)

    def _taken(self, q: Tensor, k: Tensor, number: Tensor, count: int, scene: Scene) -> Tensor:
        """How many of its first keys each chunk of queries sees of each chunk of keys, (1, H, count, count)."""
        of_queries = number[scene.offset :]
        lengths = torch.bincount(number, minlength=count)
        start = lengths.cumsum(0) - lengths
        last = start + lengths - 1  # of each chunk, as a row; its queries take keys by what the last of them may see
        own = torch.arange(count, device=q.device)
        visible = (start + lengths).minimum(last.unsqueeze(1) + 1) - start
        if scene.reach is not None:  # chunks compete of which some query of the row sees some key
            visible = visible.where(last >= start.unsqueeze(1) - scene.reach, 0)
        visible = visible.clamp_min(0).where(own <= own.unsqueeze(1), 0)  # (count, count)
        scores = score(pooled(q, of_queries, count), pooled(k, number, count))
        scores = scores.masked_fill(visible == 0, NEVER)
        order = scores.sort(dim=3, descending=True, stable=True).indices
        counts = visible.expand_as(order).gather(3, order)
        taken = (self.keys - (counts.cumsum(3) - counts)).clamp_min(0).minimum(counts)
        return torch.zeros_like(taken).scatter_(3, order, taken)

    def _chunks(self, k: Tensor, first: int) -> Tensor:
        """The number (M,) of each key's chunk, from 0."""
        if self.starts is None:
            starts = predicted_starts(k, self.chunk) + first
        else:
            starts = torch.tensor(self.starts, dtype=torch.long, device=k.device)
        slot = torch.arange(first, first + k.shape[2], device=k.device)
        number = torch.searchsorted(starts, slot, right=True)
        return number - number[0]


@dataclass(frozen=True, eq=False, repr=False)
class ChunkTable(Decided):
    """How many of a chunk's first keys are seen by each chunk of queries."""

    table: Tensor  # (B, H, C, C)
    number: Tensor  # (B, M): the chunk of each key, and of the query that stands there

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
        return Cells.of(self.table > 0, self.table >= lengths[:, None, None])

    def _at(self, tensor: Tensor, batch: Index, position: Tensor) -> Tensor:
        row = batch if len(tensor) > 1 else 0
        return tensor[row, position.clamp(0, tensor.shape[1] - 1)]

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        rows, columns = self._at(self.number, batch, q), self._at(self.number, batch, k)
        seen = self._at(self.inside, batch, k) < self.read(batch, head, rows, columns)
        return seen.expand(torch.broadcast_shapes(seen.shape, q.shape, k.shape))

    def bounds(self, boxes: Boxes) -> Bounds:
        at = Interval(*(self._at(self.number, boxes.batch, edge) for edge in boxes.position))
        some, every = self.cells.bounds(boxes.batch, boxes.head, at)
        seen = self.read(boxes.batch, boxes.head, at.q_lo, at.k_lo)
        one = (at.q_lo == at.q_hi) & (at.k_lo == at.k_hi)
        first, last = (self._at(self.inside, boxes.batch, edge) for edge in (boxes.position.k_lo, boxes.position.k_hi))
        return Bounds(torch.where(one, first < seen, some), torch.where(one, last < seen, every))


def pooled(x: Tensor, number: Tensor, count: int) -> Tensor:
    """Means of chunks of tokens (B, H, N, D), times the square root of their lengths: (B, H, count, D)."""
    sums = to_accum(x).new_zeros(*x.shape[:2], count, x.shape[3]).index_add_(2, number, to_accum(x))
    lengths = torch.bincount(number, minlength=count).clamp_min(1).to(sums.dtype)
    return sums * lengths.rsqrt().unsqueeze(1)


def predicted_starts(k: Tensor, chunk: int) -> Tensor:
    """Where chunks of keys (1, G, M, D) begin: one every ``chunk`` keys on average, where neighbours differ most.

    Keys are alike if the cosine between the means of the ``chunk // 4`` before a place and behind it is great. A
    stand-in for the paper's trained boundary predictor, which looks at the same means.
    """
    width, length = max(chunk // 4, 1), k.shape[2]
    wanted = min(length // chunk, length - 1)
    if wanted < 1:
        return torch.zeros(1, dtype=torch.long, device=k.device)
    sums = pad(to_accum(k).cumsum(2), (0, 0, 1, 0))  # (1, G, M + 1, D)
    at = torch.arange(1, length, device=k.device)
    before = sums[:, :, at] - sums[:, :, (at - width).clamp_min(0)]
    behind = sums[:, :, (at + width).clamp_max(length)] - sums[:, :, at]
    alike = (normalize(before, dim=-1) * normalize(behind, dim=-1)).sum(-1).mean((0, 1))  # (M - 1,)
    found = alike.sort(stable=True).indices[:wanted] + 1
    return torch.cat([found.new_zeros(1), found.sort().values])


def chunk_budget(keys: int, *, chunk: int = 64, starts: Sequence[int] | None = None) -> Pattern:
    """``keys`` keys for each chunk of queries, out of the chunks whose pooled keys score best with its pooled queries.

    A chunk stands for its tokens by their mean times the square root of their number. Chunks of keys are taken in the
    order of their scores, each from its first key on, until the budget of the chunk's last query is spent; no key after
    a query is seen, so that earlier queries of a chunk may see fewer (the paper has a budget for each). Chunks begin at
    ``starts``, positions in the text, or are cut where keys change most, ``chunk`` long on average.

    Xiong et al., Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs, arXiv 2510.24606.

    >>> q, k = torch.ones(1, 1, 6, 1), torch.tensor([5.0, 5, 0, 0, 0, 1]).view(1, 1, 6, 1)
    >>> chunk_budget(3, starts=[0, 2, 3]).select(q, k, tile=8).to_dense()[0, 0].int()
    tensor([[1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 0, 1, 0, 0],
            [1, 1, 0, 1, 0, 0],
            [1, 1, 0, 1, 0, 0]], dtype=torch.int32)

    Raises ValueError for a budget or chunk below 1, or starts that do not ascend from 0.
    """
    keys, chunk = positive("chunk_budget", "keys", keys), positive("chunk_budget", "chunk", chunk)
    if starts is None:
        return ChunkBudget(keys, chunk, None)
    given = whole_numbers("starts", starts)
    if not given or given[0] != 0 or any(a >= b for a, b in pairwise(given)):
        raise ValueError(f"starts of chunks ascend from 0; got {list(given)}")
    return ChunkBudget(keys, chunk, given)
