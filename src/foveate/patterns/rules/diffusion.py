"""The training mask of block diffusion: noisy blocks beside the clean text that they continue."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from foveate.patterns.algebra import Bounds, Boxes, Index, Interval, Pattern, Scene
from foveate.patterns.rules.sequence import positive, same_group


@dataclass(frozen=True, eq=False, repr=False)
class BlockDiffusion(Pattern):
    length: int
    block: int
    depends_on = "slot"

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"block_diffusion({self.length}, {self.block})"

    def resolve(self, scene: Scene) -> Pattern:
        if scene.num_keys != 2 * self.length or scene.num_queries > scene.num_keys:
            raise ValueError(
                f"{self} is for {self.length} noisy tokens and {self.length} clean ones behind them,"
                f" {2 * self.length} together; got {scene.num_queries} queries and {scene.num_keys} keys"
            )
        return self

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        clean_q, clean_k = q >= self.length, k >= self.length
        block_q, block_k = q % self.length // self.block, k % self.length // self.block
        own = (block_q == block_k) & (clean_q == clean_k)
        return own | (block_q > block_k) & clean_k

    def bounds(self, boxes: Boxes) -> Bounds:
        """Of each quarter, noisy or clean queries by noisy or clean keys, that the box reaches into."""
        parts = [self._quarter(boxes.position, clean_q, clean_k) for clean_q in (0, 1) for clean_k in (0, 1)]
        some = reduce(torch.bitwise_or, (part & here for part, _, here in parts))
        every = reduce(torch.bitwise_and, (part | ~here for _, part, here in parts))
        return Bounds(some, every)

    def _quarter(self, at: Interval, clean_q: int, clean_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Whether some and every pair is visible, and whether there is any."""
        q_lo, q_hi = self._half(at.q_lo, at.q_hi, clean_q)
        k_lo, k_hi = self._half(at.k_lo, at.k_hi, clean_k)
        here = (q_lo <= q_hi) & (k_lo <= k_hi)
        q_lo, q_hi, k_lo, k_hi = (edge // self.block for edge in (q_lo, q_hi, k_lo, k_hi))
        same = same_group(q_lo, q_hi, k_lo, k_hi)
        if not clean_k:
            never = torch.zeros_like(here)
            return (never, never, here) if clean_q else (same.some, same.every, here)
        return (q_hi + clean_q > k_lo, q_lo + clean_q > k_hi, here)

    def _half(self, low: Tensor, high: Tensor, clean: int) -> tuple[Tensor, Tensor]:
        """The part of a range that lies in a half, counted from its start; empty where high < low."""
        start = clean * self.length
        return low.clamp_min(start) - start, high.clamp_max(start + self.length - 1) - start


def block_diffusion(length: int, block: int) -> Pattern:
    """The mask that trains a block diffusion model, over ``length`` noisy tokens with the clean ones behind them.

    Noisy tokens see their own noisy block and all clean blocks before it; clean tokens see clean blocks up to
    their own. There are 2 ``length`` tokens.

    Arriola et al., Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models,
    arXiv 2503.09573.

    >>> block_diffusion(4, 2).mask(8)[0, 0].int()
    tensor([[1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0],
            [0, 0, 1, 1, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 1, 0, 0],
            [0, 0, 0, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 1, 1, 1, 1],
            [0, 0, 0, 0, 1, 1, 1, 1]], dtype=torch.int32)
    """
    return BlockDiffusion(positive("block_diffusion", "length", length), positive("block_diffusion", "block", block))
