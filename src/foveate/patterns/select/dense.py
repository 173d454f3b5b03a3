"""A pattern as a dense mask: the definition written out, for tests, small calls and pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.patterns.algebra import Pattern, Scene


def dense_mask(resolved: Pattern, scene: Scene, device: torch.device | str = "cpu") -> Tensor:
    """Boolean (batches, heads, N, M) mask of a resolved pattern; True where visible."""
    q = torch.arange(scene.num_queries, device=device).view(1, 1, -1, 1) + scene.offset
    k = torch.arange(scene.num_keys, device=device).view(1, 1, 1, -1)
    batch = torch.arange(resolved.batches, device=device).view(-1, 1, 1, 1)
    head = torch.arange(resolved.heads, device=device).view(1, -1, 1, 1)
    shape = (resolved.batches, resolved.heads, scene.num_queries, scene.num_keys)
    return resolved.visible(batch, head, q, k).expand(shape)
