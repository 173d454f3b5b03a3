"""The short causal convolution that gated recurrences put before queries, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d


class Convolved(NamedTuple):
    """Output (B, N, C), and the tail (B, C, width - 1): the inputs that later tokens still read."""

    out: Tensor
    tail: Tensor


class ShortConv(nn.Module):
    """Each channel convolved with its last ``width`` tokens.

    >>> ShortConv(6, width=4)(torch.randn(2, 9, 6)).out.shape
    torch.Size([2, 9, 6])
    """

    def __init__(self, channels: int, width: int = 4) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"a convolution reads at least one token; got width {width}")
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, 1, width).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, x: Tensor, tail: Tensor | None = None, lengths: Sequence[int] | None = None) -> Convolved:
        """Convolve x (B, N, C) after ``tail``, or each of its documents of these ``lengths``."""
        if lengths is None:
            return self.run(x, self.start(x) if tail is None else tail)
        pieces = [self.run(piece, self.start(x)).out for piece in x.split(list(lengths), dim=1)]
        return Convolved(torch.cat(pieces, dim=1), self.start(x))

    def run(self, x: Tensor, tail: Tensor) -> Convolved:
        if not x.shape[1]:
            return Convolved(x, tail)
        inputs = torch.cat([tail.to(x.dtype), x.transpose(1, 2)], dim=2)
        out = conv1d(inputs, self.weight, groups=x.shape[2]).transpose(1, 2)
        return Convolved(out, inputs[:, :, x.shape[1] :])

    @property
    def tail_shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.width - 1

    def start(self, x: Tensor) -> Tensor:
        """The tail before the first token of x (B, N, C)."""
        return x.new_zeros(x.shape[0], *self.tail_shape)
