"""Attention over blocks of whole numbers: queries, keys, values and weights rounded block by block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def rounded(x: Tensor, bits: int) -> Tensor:
    """Blocks (..., n, m) as whole numbers of ``bits`` bits times one scale for each block, symmetric about 0.

    >>> rounded(torch.tensor([[3.6, -7.0, 1.2]]), 4)
    tensor([[ 4., -7.,  1.]])
    """
    scale = x.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / (2 ** (bits - 1) - 1)
    return (x / scale).round() * scale


def attend_rounded(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, block: int, *, bits: int, scale: float) -> Tensor:
    """Attention of heads (B, H, N, D) over the blocks seen (B or 1, H, R, R), all four factors rounded by blocks.

    Of each block of ``block`` tokens queries, keys and values share a scale; weights, exponentials of what their logits
    lie below the row's greatest, share one between a block of queries and a block of keys. Rows are divided by sums of
    weights that are not rounded. Products are computed in floating point, where whole numbers of eight bits are exact:
    it says what integer kernels would give, not how fast they are. Blocks not seen are not computed.
    """
    batch, heads = v.shape[:2]
    cut = [_cut(x, block) for x in (q, k, v)]  # (B, H, R, block, D)
    queries, keys, values = (rounded(x, bits) for x in cut)
    inside = _cut(torch.ones_like(q[:1, :1, :, :1]), block)[0, 0, :, :, 0] > 0  # (R, block)
    rows = []
    for row in range(queries.shape[2]):
        listed = [seen[min(b, len(seen) - 1), h, row].nonzero().squeeze(1) for b in range(batch) for h in range(heads)]
        own = [
            _row(queries[b, h, row, inside[row]], keys[b, h, at], values[b, h, at], inside[at], bits, scale)
            for (b, h), at in zip([(b, h) for b in range(batch) for h in range(heads)], listed, strict=True)
        ]
        rows.append(torch.stack(own).unflatten(0, (batch, heads)))
    return torch.cat(rows, 2)


def _row(q: Tensor, k: Tensor, v: Tensor, inside: Tensor, bits: int, scale: float) -> Tensor:
    """Queries (n, D) of one block upon keys and values (K, block, D) of those that it sees."""
    logits = (q @ k.mT * scale).masked_fill(~inside.unsqueeze(1), float("-inf"))  # (K, n, block)
    weights = (logits - logits.amax((0, 2), keepdim=True)).exp()
    return (rounded(weights, bits) @ v).sum(0) / weights.sum((0, 2)).unsqueeze(1)


def _cut(x: Tensor, block: int) -> Tensor:
    """Heads (B, H, N, D) as (B, H, R, block, D), zeros behind the end."""
    return pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))
