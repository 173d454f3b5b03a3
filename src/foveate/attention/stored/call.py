"""One call of attend_stored, checked and completed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention.stored.segment import Segment


@dataclass(frozen=True, eq=False)
class StoredCall:
    """q (B, H, N, D), and what it attends to."""

    q: Tensor
    stored: list[Segment]
    causal: bool
    scale: float
    softcap: float | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.q, *(x for one in self.stored for x in one.tensors))

    def behind(self) -> list[Tensor]:
        """Tokens of each head behind each segment, (B, G) int64."""
        found, after = [], torch.zeros_like(self.stored[0].counts)
        for one in reversed(self.stored):
            found.append(after)
            after = after + one.counts
        return found[::-1]
