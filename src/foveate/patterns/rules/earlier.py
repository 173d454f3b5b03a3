"""Keys that are not where they stand: each query sees those of its own position and of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from foveate.patterns.algebra import Bounds, Boxes, Index, Pattern, Scene
from foveate.patterns.rules.buckets import Extremes


@dataclass(frozen=True, eq=False, repr=False)
class Earlier(Pattern):
    """Keys that stand at the query's position or before it, by ``positions`` (M,) of keys; queries count up."""

    positions: Tensor
    first: int = 0  # the number that the first query has among the keys
    depends_on = "slot"
    text = "earlier(...)"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.positions,)

    @cached_property
    def extremes(self) -> Extremes:
        return Extremes.of(self.positions.view(1, 1, -1))

    def resolve(self, scene: Scene) -> Pattern:
        return Earlier(self.positions, scene.offset)

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return self.positions[k.clamp(0, len(self.positions) - 1)] <= q - self.first

    def bounds(self, boxes: Boxes) -> Bounds:
        at, last = boxes.position, len(self.positions) - 1
        zero = torch.zeros_like(at.k_lo)
        low, high = self.extremes.between(zero, zero, at.k_lo.clamp(0, last), at.k_hi.clamp(0, last))
        return Bounds(some=low <= at.q_hi - self.first, every=high <= at.q_lo - self.first)
