"""A pattern under test, at some number of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.patterns import Layout, Pattern, Scene, Sequence, resolve
from foveate.patterns.algebra import Boxes, Interval
from foveate.patterns.select.dense import dense_mask

DIM = 8
FAR = 10**9


class Heads(NamedTuple):
    """q (B, H, N, D), k (B, G, M, D), v (B, G, M, D)."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, eq=False)
class PatternCase:
    """A pattern on a layout, with N queries and M keys."""

    pattern: Pattern
    layout: Layout | None
    num_queries: int
    num_keys: int

    def __str__(self) -> str:
        return f"{self.num_queries} queries, {self.num_keys} keys"

    def draw(self, dtype: torch.dtype = torch.float64) -> Heads:
        """Random heads: as many as the pattern tells apart, two query heads to a key head where it can be."""
        batch, heads = (count if count > 1 else 2 for count in (self.pattern.batches, self.pattern.heads))
        groups = heads // 2 if heads % 2 == 0 else heads
        sizes = ((heads, self.num_queries), (groups, self.num_keys), (groups, self.num_keys))
        return Heads(*(torch.randn(batch, *size, DIM, dtype=torch.float64).to(dtype) for size in sizes))

    def scene(self, heads: Heads) -> Scene:
        return Scene(self.num_queries, self.num_keys, self.layout or Sequence(), heads.q, heads.k)

    def resolved(self, heads: Heads) -> Pattern:
        return resolve(self.pattern, self.scene(heads))

    def mask(self, heads: Heads) -> Tensor:
        """What is visible, pair by pair: (batches, heads, N, M)."""
        scene = self.scene(heads)
        return dense_mask(resolve(self.pattern, scene), scene)


class Boxed(NamedTuple):
    """Boxes, and the pairs in each, (T, N, M)."""

    boxes: Boxes
    pairs: Tensor


def random_boxes(case: PatternCase, resolved: Pattern, scene: Scene, count: int = 60) -> Boxed:
    """Boxes of pairs at random places, of random sizes."""
    q_edges = _random_range(case.num_queries, count)
    k_edges = _random_range(case.num_keys, count)
    q, k = torch.arange(case.num_queries), torch.arange(case.num_keys)
    in_q, in_k = _inside(q, *q_edges), _inside(k, *k_edges)
    at_q, at_k = q + scene.offset, k
    position = Interval(*_span(at_q, in_q), *_span(at_k, in_k))
    coordinates = zip(scene.layout.coordinates(at_q), scene.layout.coordinates(at_k), strict=True)
    axes = tuple(Interval(*_span(on_q, in_q), *_span(on_k, in_k)) for on_q, on_k in coordinates)
    batch, head = torch.randint(resolved.batches, (count,)), torch.randint(resolved.heads, (count,))
    return Boxed(Boxes(batch, head, position, axes), in_q[:, :, None] & in_k[:, None, :])


def _random_range(length: int, count: int) -> tuple[Tensor, Tensor]:
    reach = int(torch.randint(1, length + 1, ()))
    low = torch.randint(length, (count,))
    return low, (low + torch.randint(reach, (count,))).clamp_max(length - 1)


def _inside(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (low[:, None] <= values) & (values <= high[:, None])


def _span(values: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value of the members, (T,) each."""
    return torch.where(member, values, FAR).amin(1), torch.where(member, values, -FAR).amax(1)
