"""Diagonal state spaces that tokens do not change: parameters, discretisation, convolution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from foveate.mixers.stateful import Lengths
from foveate.precision import to_accum
from foveate.recurrence.ssm import Discrete, Evolved, discretize, evolve, hippo_rates

ROUNDED = "transforms mix all tokens, and gradients to later ones cancel but for rounding"


class Dynamics(nn.Module):
    """Rates and step sizes of a diagonal state space (shape...), discretised when called.

    >>> Dynamics(hippo_rates(4).expand(6, 4), steps=6)().transition.shape
    torch.Size([6, 4])
    """

    def __init__(self, rates: Tensor, *, steps: int, method: str = "zoh") -> None:
        super().__init__()
        self.method = method
        dtype = torch.get_default_dtype()
        self.log_decay = nn.Parameter((-rates.real).log().to(dtype))
        self.frequency = nn.Parameter(rates.imag.to(dtype, copy=True))
        self.log_step = nn.Parameter(torch.empty(steps).uniform_(math.log(1e-3), math.log(1e-1)))

    def forward(self) -> Discrete:
        rates = torch.complex(-to_accum(self.log_decay).exp(), to_accum(self.frequency))
        step = to_accum(self.log_step).exp()
        return discretize(rates, step.unsqueeze(-1) if rates.dim() == 2 else step, self.method)


class DiagonalSSM(nn.Module):
    """S4D: in each channel ``state`` real numbers as half as many complex ones, and a skip connection.

    >>> DiagonalSSM(6, state=8)(torch.randn(2, 9, 6)).out.shape
    torch.Size([2, 9, 6])
    """

    def __init__(
        self, channels: int, state: int = 64, *, method: str = "zoh", rates: Callable[[int], Tensor] = hippo_rates
    ) -> None:
        super().__init__()
        pairs = halved(state)
        self.dynamics = Dynamics(rates(pairs).expand(channels, pairs), steps=channels, method=method)
        self.read = complex_parameter(channels, pairs)
        self.D = nn.Parameter(torch.randn(channels))

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        final: bool = True,
        lengths: Lengths = None,
        chunk: int | None = None,
    ) -> Evolved:
        """Evolve x (B, N, C) after ``state`` (B, C, S / 2), in pieces of ``chunk`` tokens."""
        transition, entry = self.dynamics()
        read = as_complex(self.read)
        y, after = evolve(x, transition, entry, read, state=state, final=final, lengths=lengths, chunk=chunk)
        return Evolved(y + self.D * x, after)

    def init_state(self, batch: int) -> Tensor:
        """The state before the first token."""
        return as_complex(self.read).new_zeros(batch, *self.read.shape[:2])


class State(NamedTuple):
    """The complex numbers of a state space."""

    numbers: Tensor


def complex_parameter(*shape: int, scale: float = 1.0) -> nn.Parameter:
    """Complex numbers as pairs of real ones (..., 2), of standard deviation ``scale``."""
    return nn.Parameter(torch.randn(*shape, 2) * scale * 2**-0.5)


def as_complex(parameter: Tensor) -> Tensor:
    return torch.view_as_complex(to_accum(parameter))


def halved(state: int) -> int:
    """Complex numbers that stand for ``state`` real ones."""
    if state < 2 or state % 2:
        raise ValueError(f"state counts real numbers, two for each complex one; got {state}")
    return state // 2
