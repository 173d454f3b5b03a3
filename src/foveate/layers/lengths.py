"""How many keys each query sees, where only causality, padding and packing hide any."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.layouts.kinds import Layout, Packed


def keys_seen(x: Tensor, causal: bool, layout: Layout | None, padding: Tensor | None) -> Tensor:
    """Of each token of x (B, N, C) in its own document, padding left out: (B or 1, N), whole numbers.

    >>> keys_seen(torch.zeros(1, 5, 2), True, Packed([2, 3]), None)
    tensor([[1, 2, 1, 2, 3]])
    """
    real = torch.ones(1, x.shape[1], dtype=torch.long, device=x.device) if padding is None else padding.long()
    lengths = layout.lengths if isinstance(layout, Packed) else (x.shape[1],)
    parts = real.split(list(lengths), dim=1)
    if causal:
        return torch.cat([part.cumsum(1) for part in parts], dim=1)
    return torch.cat([part.sum(1, keepdim=True).expand_as(part) for part in parts], dim=1)
