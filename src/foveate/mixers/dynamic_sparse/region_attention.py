"""Attention inside regions of any shape: tokens of a label see one another, and nobody else."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention import attend
from foveate.patterns import same_bucket


def region_attention(q: Tensor, k: Tensor, v: Tensor, regions: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention of tokens (B, H, N, D) to those of their own region, by whole numbers ``regions`` (B, N).

    Tokens are sorted by region, so that a region is a run of tokens, attend, and are put back: the cost is the sum of
    the regions' squared sizes, whatever their shapes. A region of one token gives its value; tokens of a negative
    number belong to no region and get zeros.

    Yang et al., Region Attention Transformer for Medical Image Restoration, arXiv 2407.09268.

    >>> q = k = v = torch.randn(1, 2, 6, 8)
    >>> out = region_attention(q, k, v, torch.tensor([[3, 0, 3, 0, 7, -1]]))
    >>> torch.allclose(out[:, :, 4], v[:, :, 4]), bool(out[:, :, 5].any())
    (True, False)

    Raises ValueError for regions that are not one whole number for each token.
    """
    whole = not regions.is_floating_point() and regions.dtype != torch.bool
    if not whole or regions.shape != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"regions are whole numbers {(q.shape[0], q.shape[2])}; got {regions.dtype} {tuple(regions.shape)}"
        )
    order = torch.argsort(regions, dim=1, stable=True)
    q, k, v = (in_order(x, order) for x in (q, k, v))
    mixed = attend(q, k, v, same_bucket(regions.gather(1, order).unsqueeze(1)), scale=scale)
    return in_order(mixed, order.argsort(1))


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """Heads (B, H, N, D) in an order (B, N) of each batch entry."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
