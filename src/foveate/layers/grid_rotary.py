"""Rotary positions on grids: a share of the channels turns with each axis."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.layers.rotary import rotate
from foveate.patterns import Grid, Layout


def rotate_on(x: Tensor, layout: Layout | None, base: float = 10_000.0, *, first: int = 0) -> Tensor:
    """Turn heads x (B, H, N, D) to their places on ``layout``, a sequence starting at position ``first``.

    On a grid of A axes the first D / A channels (rounded down) turn with the first coordinate, the next with the
    second, and so on; what is left over stays as it is. Products of rotated queries and keys depend on the
    difference of their coordinates alone.

    Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv 2104.09864; on images as in
    Fan et al., RMT: Retentive Networks Meet Vision Transformers, 2309.11523.

    >>> rotate_on(torch.ones(1, 1, 6, 8), Grid(2, 3))[0, 0, 1].tolist()[:4]  # in row 0
    [1.0, 1.0, 1.0, 1.0]
    """
    positions = torch.arange(first, first + x.shape[2], device=x.device)
    if not isinstance(layout, Grid):
        return rotate(x, positions, base)
    width = x.shape[-1] // layout.num_axes
    parts = x.split([width] * layout.num_axes + [x.shape[-1] - width * layout.num_axes], dim=-1)
    turned = [rotate(part, place, base) for part, place in zip(parts, layout.coordinates(positions), strict=False)]
    return torch.cat([*turned, parts[-1]], dim=-1)
