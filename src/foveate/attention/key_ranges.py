"""Which stretches of keys each head sees: lists of slots, in place of a pattern of pairs."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.attention.weights import Weights
from foveate.patterns.ranges import Ranges
from foveate.patterns.rules.choose import best


class KeyRanges(NamedTuple):
    """Key slots [first, end) that all queries of a head see; ranges of a row, a batch entry and head, do not overlap.

    ``batches`` and ``heads`` are those that the lists tell apart, 1 if none; consecutive query heads share a row. Row r
    owns the ranges ``starts[r]`` to ``starts[r + 1]``.
    """

    batches: int
    heads: int
    starts: Tensor | array[int]  # (rows + 1,) int64
    ranges: Tensor | array[int]  # (R, 2) int64, in a row

    @classmethod
    def of(cls, heads: Sequence[Ranges]) -> KeyRanges:
        """Those of each head, the same in all batch entries.

        >>> KeyRanges.of([((0, 2), (6, 10))]).ranges
        array('q', [0, 2, 6, 10])
        """
        starts = [0]
        flat: list[int] = []
        for ranges in heads:
            for pair in ranges:
                flat += pair
            starts.append(len(flat) // 2)
        return cls(1, len(heads), array("q", starts), array("q", flat))

    @classmethod
    def of_blocks(cls, chosen: Tensor, size: int, num_keys: int) -> KeyRanges:
        """Chosen blocks of ``size`` keys, booleans (B, H, C), of which the last may lack keys.

        >>> KeyRanges.of_blocks(torch.tensor([[[True, False, True]]]), 4, 10).ranges
        tensor([[ 0,  4],
                [ 8, 10]])
        """
        first = chosen.nonzero()[:, 2] * size
        starts = torch.zeros(chosen.shape[0] * chosen.shape[1] + 1, dtype=torch.long, device=chosen.device)
        torch.cumsum(chosen.sum(2).flatten(), 0, out=starts[1:])
        return cls(
            chosen.shape[0], chosen.shape[1], starts, torch.stack([first, (first + size).clamp_max(num_keys)], 1)
        )

    @classmethod
    def of_best(
        cls, scores: Tensor, count: int, size: int, num_keys: int, *, first: int = 0, own: int = 0
    ) -> KeyRanges:
        """The ``count`` < C blocks of ``size`` keys of the best scores (B, H, C), ``first`` before and ``own`` behind.

        >>> KeyRanges.of_best(torch.tensor([[[1.0, 3.0, 2.0]]]), 1, 4, 18, first=1, own=1).ranges
        array('q', [0, 4, 8, 12, 16, 18])
        """
        batch, heads, number = scores.shape
        # As lists: these few numbers are sooner walked than ten operators called.
        values, order = scores.topk(count + 1)
        clear = all(row[count - 1] > row[count] for entry in values.tolist() for row in entry)
        if not clear and count:  # of equal ones the first
            return cls.of_blocks(pad(best(scores, count), (first, own), value=True), size, num_keys)
        before, behind = (
            [min(edge, num_keys) for block in blocks for edge in (block * size, block * size + size)]
            for blocks in (range(first), range(first + number, first + number + own))
        )
        start = first * size
        ranges: list[int] = []
        for row in (row for entry in order.tolist() for row in entry):
            ranges += before
            ranges += [edge for at in row[:count] for edge in (at * size + start, at * size + start + size)]
            ranges += behind
        if not own:  # a chosen block may be the last
            ranges = [min(edge, num_keys) for edge in ranges]
        each = first + count + own
        return cls(batch, heads, array("q", range(0, each * batch * heads + 1, each)), array("q", ranges))

    @property
    def total(self) -> int:
        """Keys of all lists."""
        return int(_as_tensor(self.ranges).view(-1, 2).diff(dim=1).sum())

    @property
    def single(self) -> tuple[int, int] | None:
        """The one range that all queries see, if that is known to be all."""
        if self.heads == 1 and isinstance(self.ranges, array) and len(self.ranges) == 2:
            return self.ranges[0], self.ranges[1]
        return None

    def mask(self, num_keys: int, device: torch.device) -> Tensor:
        """The same as booleans, (batches, heads, 1, M)."""
        starts, ranges = (_as_tensor(x).to(device) for x in (self.starts, self.ranges))
        row = torch.repeat_interleave(torch.arange(starts.numel() - 1, device=device), starts.diff())
        edges = torch.zeros(starts.numel() - 1, num_keys + 1, dtype=torch.long, device=device)
        for side, sign in enumerate((1, -1)):
            edges.index_put_((row, ranges.view(-1, 2)[:, side]), edges.new_tensor(sign), accumulate=True)
        return (edges.cumsum(1)[:, :num_keys] > 0).view(self.batches, self.heads, 1, num_keys)


class RangesCall(NamedTuple):
    """One call of attend_ranges, checked: q (B, H, N, D), k (B, G, M, D), v (B, Gv, M, Dv) and how to attend."""

    q: Tensor
    k: Tensor
    v: Tensor
    seen: KeyRanges
    bias: Tensor | None
    weights: Weights | str
    scale: float | None
    logits: bool = False  # whether they are wanted

    @property
    def factor(self) -> float:
        return self.q.shape[3] ** -0.5 if self.scale is None else self.scale


class Scored(NamedTuple):
    """Heads out (B, H, N, Dv), and the logits (B, H, N, M) if they were asked for."""

    out: Tensor
    logits: Tensor | None


def _as_tensor(numbers: Tensor | array[int]) -> Tensor:
    return numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=torch.long, device="cpu")
