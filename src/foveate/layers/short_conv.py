"""The short causal convolution that gated recurrences put before queries, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from foveate.recurrence.selective.api import Convolved, causal_conv


class ShortConv(nn.Module):
    """Each channel convolved with its last ``width`` tokens, with a ``bias`` and an ``activation`` if asked for.

    >>> ShortConv(6, width=4)(torch.randn(2, 9, 6)).out.shape
    torch.Size([2, 9, 6])
    """

    def __init__(
        self, channels: int, width: int = 4, *, bias: bool = False, activation: Literal["silu"] | None = None
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"a convolution reads at least one token; got width {width}")
        self.width, self.activation = width, activation
        reach = width**-0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, width).uniform_(-reach, reach))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-reach, reach)) if bias else None

    def forward(self, x: Tensor, tail: Tensor | None = None, lengths: Sequence[int] | None = None) -> Convolved:
        """Convolve x (B, N, C) after ``tail``, or each of its documents of these ``lengths``."""
        taps = self.weight.squeeze(1)
        return causal_conv(x, taps, self.bias, tail=tail, activation=self.activation, lengths=lengths)

    @property
    def tail_shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.width - 1

    def init_state(self, batch: int) -> Tensor:
        """The tail before the first token."""
        return self.weight.new_zeros(batch, *self.tail_shape)
