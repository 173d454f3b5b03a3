"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Turn channel pairs (c, c + D / 2) of x (B, H, N, D) by angles proportional to ``positions`` (N,).

    Products of rotated queries and keys depend on the difference of their positions alone. An odd last
    channel stays as it is.

    Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv 2104.09864.

    >>> q, k = torch.randn(2, 1, 1, 1, 8).unbind(0)
    >>> near = rotate(q, torch.tensor([3])) * rotate(k, torch.tensor([1]))
    >>> far = rotate(q, torch.tensor([103])) * rotate(k, torch.tensor([101]))
    >>> torch.allclose(near.sum(), far.sum(), atol=1e-4)
    True
    """
    half = x.shape[-1] // 2
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    channel = torch.arange(half, device=x.device, dtype=torch.float64)
    angles = positions.unsqueeze(-1) * base ** (-channel / max(half, 1))  # (N, D / 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, rest], dim=-1)
