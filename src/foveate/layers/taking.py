"""Tokens taken by lists that differ from head to head, and put back."""

from __future__ import annotations

import torch
from torch import Tensor


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` (B or 1, G or 1, C) of x (B, G, M, D), or numbers of x (B, G, M): (B, G, C, ...).

    >>> take(torch.arange(4.0).view(1, 1, 4, 1), torch.tensor([[[3, 0, 0]]])).flatten()
    tensor([3., 0., 0.])
    """
    index = index.to(x.device).expand(*x.shape[:2], -1)
    if x.dim() == 3:
        return x.gather(2, index)
    return x.gather(2, index.unsqueeze(3).expand(-1, -1, -1, x.shape[3]))


def put_back(x: Tensor, index: Tensor) -> Tensor:
    """Where ``index`` (B, H, N) is an order: undo :func:`take` by it.

    >>> order = torch.tensor([[[2, 0, 1]]])
    >>> x = torch.randn(1, 1, 3, 2)
    >>> torch.equal(put_back(take(x, order), order), x)
    True
    """
    return take(x, inverse(index))


def inverse(order: Tensor) -> Tensor:
    """Where each token stands in an order (..., N)."""
    place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)
