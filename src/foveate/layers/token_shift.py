"""Token shift: what RWKV's layers see is a mixture of each token and the one before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def previous(x: Tensor, last: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """The row before each row of x (B, N, C): ``last`` (B, C) before the first, zeros before a document's first.

    >>> x = torch.arange(1.0, 5.0).view(1, 4, 1)
    >>> previous(x, torch.tensor([[9.0]])).flatten()
    tensor([9., 1., 2., 3.])
    >>> previous(x, torch.tensor([[9.0]]), lengths=[1, 0, 3]).flatten()
    tensor([0., 0., 2., 3.])
    """
    before = torch.cat([last.unsqueeze(1), x], dim=1)[:, : x.shape[1]]
    if lengths is None:
        return before
    ends = torch.tensor(lengths).cumsum(0)
    first = torch.isin(torch.arange(x.shape[1]), ends - torch.tensor(lengths)).to(x.device)
    return before.masked_fill(first[:, None], 0)


def last_of(last: Tensor, x: Tensor) -> Tensor:
    """The last of the rows ``last`` (B, C) and x (B, N, C)."""
    return x[:, -1] if x.shape[1] else last


def mixed(x: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """A ``share`` of the other and the rest of x."""
    return x + (other - x) * share


def ramp(channels: int) -> Tensor:
    """From 0 in the first channel to 1 in the last: channels start with different shares and rates."""
    return torch.linspace(0, 1, channels)
