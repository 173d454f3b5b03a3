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


def rows_of_mask(resolved: Pattern, scene: Scene, rows: Tensor, heads: int) -> Tensor:
    """What the queries of numbers ``rows`` (n,) see, told apart for each of ``heads`` heads: (batches, heads, n, M).

    >>> from foveate import causal
    >>> rows_of_mask(causal, Scene(3, 4), torch.tensor([0, 2]), heads=1)[0, 0].int()
    tensor([[1, 1, 0, 0],
            [1, 1, 1, 1]], dtype=torch.int32)
    """
    of_batch, of_head = (torch.arange(n, device=rows.device) for n in (resolved.batches, resolved.heads))
    at, key = rows.unsqueeze(1) + scene.offset, torch.arange(scene.num_keys, device=rows.device)
    seen = resolved.visible(of_batch.view(-1, 1, 1, 1), of_head.view(1, -1, 1, 1), at, key)
    seen = seen.expand(resolved.batches, resolved.heads, len(rows), scene.num_keys)
    return seen.repeat_interleave(heads // resolved.heads, 1)
