"""Attention of videos factorised into space and time, each by whatever mixer is plugged in."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Factorised(nn.Module):
    """Tokens (B, T, N, C) mixed by one mixer over the N of each frame and by another over the T at each place.

    ``in_turn`` gives time what space has made of them; else both see the tokens as they are, and a learned weighted sum
    joins the two (the mean, to begin with), as in DSTA.

    >>> from foveate.catalogue.registry import mixer
    >>> block = Factorised(mixer("flash_attention", 16, heads=2, causal=False), mixer("mamba", 16))
    >>> block(torch.randn(2, 5, 7, 16)).shape
    torch.Size([2, 5, 7, 16])

    Raises ValueError for tokens of another number of dimensions.
    """

    def __init__(self, space: nn.Module, time: nn.Module, *, in_turn: bool = True) -> None:
        super().__init__()
        self.space, self.time = space, time
        self.weights = None if in_turn else nn.Parameter(torch.full((2,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(
                f"factorised attention takes tokens (batch, frames, places, channels); got {tuple(x.shape)}"
            )
        in_space = self.space(x.flatten(0, 1)).view(x.shape)
        if self.weights is None:
            return self.over_time(in_space)
        return self.weights[0] * in_space + self.weights[1] * self.over_time(x)

    def over_time(self, x: Tensor) -> Tensor:
        places = x.transpose(1, 2)
        return self.time(places.flatten(0, 1)).view(places.shape).transpose(1, 2)
