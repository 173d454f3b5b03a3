"""A dynamic pattern that chooses by chunks of unequal lengths, key by key up to a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from foveate.counts import whole_numbers
from foveate.patterns.algebra import Pattern, Scene
from foveate.patterns.rules.choice import PromptChoice, counted_from
from foveate.patterns.rules.choose import NEVER, score
from foveate.patterns.rules.decided import ChunkTable
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
        table = ChunkTable(torch.cat(tables), torch.stack(numbers), self.keys)
        return counted_from(scene.first, table)

    def _taken(self, q: Tensor, k: Tensor, number: Tensor, count: int, scene: Scene) -> Tensor:
        """What lies ahead of each chunk of keys for each chunk of queries, (1, H, count, count): see `ChunkTable`."""
        of_queries = number[scene.offset :]
        lengths = torch.bincount(number, minlength=count)
        own = torch.arange(count, device=q.device)
        competes = (own <= own.unsqueeze(1)) & (lengths > 0)
        if scene.reach is not None:  # chunks compete of which some query of the row sees some key
            start = lengths.cumsum(0) - lengths
            competes &= start + lengths - 1 >= start.unsqueeze(1) - scene.reach
        scores = score(pooled(q, of_queries, count), pooled(k, number, count)).masked_fill_(~competes, NEVER)
        order = scores.sort(dim=3, descending=True, stable=True).indices
        is_own = order == own.unsqueeze(1)
        counts = lengths.expand_as(order).gather(3, order).masked_fill_(is_own, 0)
        ahead = 2 * (counts.cumsum(3) - counts) + (is_own.cumsum(3) - is_own.long())
        return torch.empty_like(ahead).scatter_(3, order, ahead).masked_fill_(~competes, 2 * self.keys)

    def _chunks(self, k: Tensor, first: int) -> Tensor:
        """The number (M,) of each key's chunk, from 0."""
        if self.starts is None:
            starts = predicted_starts(k, self.chunk) + first
        else:
            starts = torch.tensor(self.starts, dtype=torch.long, device=k.device)
        slot = torch.arange(first, first + k.shape[2], device=k.device)
        number = torch.searchsorted(starts, slot, right=True)
        return number - number[0]


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
    """``keys`` keys for each query, out of the chunks whose pooled keys suit its own chunk's pooled queries best.

    A chunk stands for its tokens by their mean times the square root of their number; its score is that of all of its
    keys. Each query sees those of the greatest scores up to itself, of equal ones the first, and no more than the
    budget. Chunks begin at ``starts``, positions in the text, or are cut where keys change most, ``chunk`` long on
    average.

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
