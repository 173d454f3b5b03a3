"""Patterns of labels: tokens see those that carry their own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.patterns.algebra import Bounds, Boxes, Index, Pattern, Scene
from foveate.patterns.rules.bits import own

BLOCK = 64  # tokens


class Extremes(NamedTuple):
    """Least and greatest label of every stretch of 1, 2, 4, ... blocks of BLOCK tokens, each (B, H, levels, blocks)."""

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> Extremes:
        last = labels[..., -1:].expand(-1, -1, -labels.shape[2] % BLOCK)
        blocks = torch.cat([labels, last], 2).unflatten(2, (-1, BLOCK))
        low, high = [blocks.amin(3)], [blocks.amax(3)]
        width = 1
        while 2 * width <= blocks.shape[2]:
            low.append(torch.minimum(low[-1], _ahead(low[-1], width)))
            high.append(torch.maximum(high[-1], _ahead(high[-1], width)))
            width *= 2
        return cls(torch.stack(low, 2), torch.stack(high, 2))

    def between(self, batch: Index, head: Index, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Of each range of tokens, of those beside it in their blocks too: two stretches cover it."""
        first, last = first // BLOCK, last // BLOCK
        level = torch.frexp((last - first + 1).double()).exponent.long() - 1
        second = last + 1 - (1 << level)
        row = own(batch, head, self.low)
        return (
            torch.minimum(self.low[(*row, level, first)], self.low[(*row, level, second)]),
            torch.maximum(self.high[(*row, level, first)], self.high[(*row, level, second)]),
        )


def _ahead(values: Tensor, width: int) -> Tensor:
    """Each entry's value ``width`` further on; at the end its own."""
    return torch.cat([values[..., width:], values[..., values.shape[-1] - width :]], -1)


@dataclass(frozen=True, eq=False, repr=False)
class EqualLabels(Pattern):
    """Pairs of equal labels; a negative label equals none."""

    of_queries: Tensor  # (B, H, N)
    of_keys: Tensor  # (B, H, M)
    q_start: int  # position of query 0
    depends_on = "slot"

    text = "equal_labels(...)"

    @property
    def batches(self) -> int:  # type: ignore[override]
        return max(self.of_queries.shape[0], self.of_keys.shape[0])

    @property
    def heads(self) -> int:  # type: ignore[override]
        return max(self.of_queries.shape[1], self.of_keys.shape[1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.of_queries, self.of_keys)

    @cached_property
    def extremes(self) -> tuple[Extremes, Extremes]:
        return Extremes.of(self.of_queries), Extremes.of(self.of_keys)

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        asked = self.of_queries[(*own(batch, head, self.of_queries), self._row(q))]
        label = self.of_keys[(*own(batch, head, self.of_keys), k.clamp(0, self.of_keys.shape[2] - 1))]
        return (asked == label) & (asked >= 0)

    def bounds(self, boxes: Boxes) -> Bounds:
        at, entry = boxes.position, (boxes.batch, boxes.head)
        last = self.of_keys.shape[2] - 1
        asked_low, asked_high = self.extremes[0].between(*entry, self._row(at.q_lo), self._row(at.q_hi))
        low, high = self.extremes[1].between(*entry, at.k_lo.clamp(0, last), at.k_hi.clamp(0, last))
        some = (asked_low <= high) & (low <= asked_high) & (asked_high >= 0)
        return Bounds(some, every=(asked_low == high) & (low == asked_high) & (asked_low >= 0))

    def _row(self, q: Tensor) -> Tensor:
        return (q - self.q_start).clamp(0, self.of_queries.shape[2] - 1)


@dataclass(frozen=True, eq=False, repr=False)
class SameBucket(Pattern):
    buckets: Tensor  # (B, H, M), or (B, H, N) beside those of the keys
    of_keys: Tensor | None = None  # (B, H, M)
    depends_on = "slot"

    @property
    def text(self) -> str:  # type: ignore[override]
        return "same_bucket(...)" if self.of_keys is None else "same_bucket(..., ...)"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.buckets,) if self.of_keys is None else (self.buckets, self.of_keys)

    @property
    def batches(self) -> int:  # type: ignore[override]
        return max(tensor.shape[0] for tensor in self.tensors)

    @property
    def heads(self) -> int:  # type: ignore[override]
        return max(tensor.shape[1] for tensor in self.tensors)

    def resolve(self, scene: Scene) -> Pattern:
        of_keys = self.buckets if self.of_keys is None else self.of_keys
        first = scene.offset if self.of_keys is None else 0
        of_queries = self.buckets[:, :, max(first, 0) :]
        fits = first >= 0 and of_keys.shape[2] == scene.num_keys and of_queries.shape[2] == scene.num_queries
        if not fits:
            counts = " and ".join(str(tensor.shape[2]) for tensor in self.tensors)
            raise ValueError(
                f"{self} has buckets of {counts} tokens, but there are {scene.num_queries} queries and"
                f" {scene.num_keys} keys"
            )
        return EqualLabels(of_queries, of_keys, scene.offset)


def same_bucket(buckets: Tensor, of_keys: Tensor | None = None) -> Pattern:
    """Keys in the query's own bucket: ``buckets`` (B, H, M) are whole numbers, negative for no bucket.

    B and H may be 1. Queries are the last tokens, as everywhere; where they are not among the keys, as in
    cross-attention, give theirs (B, H, N) and those ``of_keys`` (B, H, M). Several rounds of hashing are joined
    by ``|``, no pair counts twice. Kitaev et al., Reformer: The Efficient Transformer, arXiv 2001.04451.

    >>> same_bucket(torch.tensor([[[3, 1, 3, -1]]])).mask(4)[0, 0].int()
    tensor([[1, 0, 1, 0],
            [0, 1, 0, 0],
            [1, 0, 1, 0],
            [0, 0, 0, 0]], dtype=torch.int32)

    Raises ValueError for any other tensor, and at the call where N or M differ from its queries and keys.
    """
    tensors = (buckets,) if of_keys is None else (buckets, of_keys)
    for tensor in tensors:
        whole = isinstance(tensor, Tensor) and not tensor.is_floating_point() and tensor.dtype != torch.bool
        if not whole or tensor.dim() != 3 or 0 in tensor.shape[:2]:
            kind = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
            raise ValueError(f"same_bucket takes whole numbers (B, H, tokens), at least one of each; got {kind}")
    for dim, name in ((0, "batch entries"), (1, "heads")):
        counts = {tensor.shape[dim] for tensor in tensors} - {1}
        if len(counts) > 1:
            raise ValueError(f"same_bucket got buckets for different numbers of {name}: {sorted(counts)}")
    return SameBucket(buckets, of_keys)
