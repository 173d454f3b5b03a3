"""Recurrent mixers whose queries and keys carry their positions."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.mixers.recurrent import Lengths, Projected, RecurrentMixer


class Positioned(RecurrentMixer):
    """A recurrent mixer whose queries and keys carry their positions; its decoder counts tokens."""

    def positioned(self, x: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys (B, H or G, N, D) at ``positions`` (N,)."""
        raise NotImplementedError

    def project(self, x: Tensor, context: Tensor, tails: tuple[Tensor, ...], lengths: Lengths = None) -> Projected:
        *tails_of_convs, first = tails or (torch.zeros((), dtype=torch.long, device=x.device),)
        q, k, v, after = super().project(x, context, tuple(tails_of_convs), lengths)
        q, k = (self.positioned(y, first + places(y.shape[2], lengths).to(x.device)) for y in (q, k))
        return Projected(q, k, v, (*after, first + x.shape[1]))


def places(length: int, lengths: Lengths = None) -> Tensor:
    """Positions 0, 1, 2, ..., (N,), in each document of a pack anew.

    >>> places(5, [3, 0, 2])
    tensor([0, 1, 2, 0, 1])
    """
    return torch.cat([torch.arange(each) for each in ([length] if lengths is None else lengths)])
