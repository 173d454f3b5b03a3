"""State spaces in continuous time, and the steps that they take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.precision import accum_dtype


class Discrete(NamedTuple):
    """A state space in steps: the logarithm of what is kept of each state, and how much of an input enters it."""

    transition: Tensor  # (..., S), complex
    entry: Tensor  # (..., S), complex


def discretize(rates: Tensor, step: Tensor, method: str = "zoh") -> Discrete:
    """Turn h' = rates h + x into steps h_t = exp(transition) h_{t-1} + entry x_t of sizes ``step``.

    >>> rates, step = torch.tensor([-1.0 + 2.0j]), torch.tensor([0.1])
    >>> transition, entry = discretize(rates, step)
    >>> torch.allclose(transition.exp(), 1 + rates * entry)
    True

    ``rates`` (..., S) are complex with negative real parts, ``step`` broadcasts against them. "zoh" holds inputs
    constant during a step, "bilinear" takes the trapezoidal rule.
    """
    turn = rates * step
    if method == "zoh":
        return Discrete(turn, (turn.exp() - 1) / rates)
    if method == "bilinear":
        return Discrete(torch.log((1 + turn / 2) / (1 - turn / 2)), step / (1 - turn / 2))
    raise ValueError(f'method is "zoh" or "bilinear"; got {method!r}')


def hippo_rates(count: int) -> Tensor:
    """Eigenvalues (count,), with positive imaginary part, of the normal part of the HiPPO-LegS matrix.

    They are complex64, or complex128 where float64 is torch's default dtype.

    >>> hippo_rates(2)
    tensor([-0.5000+0.5565j, -0.5000+4.6033j])

    Papers: Gu et al., HiPPO, arXiv 2008.07669; S4D-LegS in 2206.11893.
    """
    order = (torch.arange(2 * count, dtype=torch.float64, device=torch.get_default_device()) + 0.5).sqrt()
    skew = torch.outer(order, order).triu(1)
    imaginary = torch.linalg.eigvalsh(1j * (skew - skew.T))[count:]
    dtype = accum_dtype(torch.get_default_dtype())
    return torch.complex(*(part.to(dtype) for part in (torch.full_like(imaginary, -0.5), imaginary)))


def linear_rates(count: int) -> Tensor:
    """Rates (count,) of S4D-Lin: they fade alike, at frequencies that are multiples of π.

    >>> linear_rates(3)
    tensor([-0.5000+0.0000j, -0.5000+3.1416j, -0.5000+6.2832j])

    Paper: Gu, Gupta, Goel, Ré, arXiv 2206.11893.
    """
    dtype, device = accum_dtype(torch.get_default_dtype()), torch.get_default_device()
    frequencies = torch.pi * torch.arange(count, dtype=dtype, device=device)
    return torch.complex(torch.full_like(frequencies, -0.5), frequencies)
