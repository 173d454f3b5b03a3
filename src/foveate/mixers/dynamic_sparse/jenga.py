"""Jenga: blocks of tokens along a generalised Hilbert curve choose blocks by what their means promise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention import attend
from foveate.layouts.hilbert import hilbert
from foveate.layouts.kinds import Grid
from foveate.layouts.orders import Order
from foveate.mixers.dynamic_sparse.on_video import VideoCore, positions
from foveate.patterns import Pattern, block_mask, full, global_tokens
from foveate.patterns.rules.choose import fewest, pool
from foveate.plain import remembered


@dataclass(frozen=True, eq=False)
class Jenga(VideoCore):
    """Blocks of ``block`` tokens along the curve see the fewest blocks that hold ``mass``, adjacent ones, and text.

    Tokens of the video are laid along a generalised Hilbert curve, so that a block is a lump of space and time. For
    each head the softmax between the blocks' mean queries and mean keys says which blocks together hold ``mass``; added
    are the blocks that touch a block in the video, itself among them. All see the text, and the text sees all. The
    authors take blocks that touch at edges and corners too, add something to the logits of text keys, and keep a least
    number of blocks.

    >>> core = Jenga((4, 3, 3), text=2, block=4)
    >>> q = k = v = torch.randn(1, 2, 38, 8)
    >>> core(q, k, v).shape
    torch.Size([1, 2, 38, 8])
    """

    block: int = 128
    mass: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1 or self.block < 1:
            raise ValueError(f"mass is above 0 and at most 1, a block at least a token; got {self.mass}, {self.block}")

    @property
    def order(self) -> Order:
        """Tokens along the curve, text behind them."""
        return Order(positions(hilbert(self.video).index, self.text))

    @torch.no_grad()
    def chosen(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """The blocks (B, H, R, R) that blocks of the video see, of queries and keys along the curve."""
        video = self.video.length
        of_q, of_k = (pool(x[:, :, :video], self.block) for x in (q, k))
        found = fewest((of_q @ of_k.mT * scale).softmax(-1), self.mass)
        return found | adjacent(self.video, self.block).to(q.device)

    def pattern_of(self, chosen: Tensor) -> Pattern:
        """The pattern along the curve of blocks chosen: those behind the video hold text, which all see."""
        if not self.text:
            return block_mask(chosen, self.block)
        blocks, rows = -(-self.length // self.block), chosen.shape[2]
        table = chosen.new_zeros(*chosen.shape[:2], blocks, blocks)
        table[:, :, :rows, :rows] = chosen
        return block_mask(table, self.block) | global_tokens(range(self.video.length, self.length))

    def run(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (self.order.apply(x, 2) for x in (q, k, v))
        return self.order.undo(attend(q, k, v, self.pattern_of(self.chosen(q, k, scale)), scale=scale), 2)

    def mask(self, q: Tensor, k: Tensor, v: Tensor, scale: float, within: Pattern = full) -> Tensor:
        pattern = self.pattern_of(self.chosen(self.order.apply(q, 2), self.order.apply(k, 2), scale))
        along = pattern.mask(self.length).expand(q.shape[0], q.shape[1], -1, -1)
        rank = self.order.inverse.to(along.device)
        return along[:, :, rank][:, :, :, rank]


@remembered(16)
def adjacent(grid: Grid, block: int) -> Tensor:
    """Blocks (R, R) of the curve of which some tokens touch: neighbours along an axis, or of the same block."""
    block_of = (hilbert(grid).inverse // block).view(grid.dims)
    count = -(-grid.length // block)
    found = torch.eye(count, dtype=torch.bool)
    for axis, size in enumerate(grid.dims):
        one, other = block_of.narrow(axis, 0, size - 1).flatten(), block_of.narrow(axis, 1, size - 1).flatten()
        found[one, other] = found[other, one] = True
    return found
