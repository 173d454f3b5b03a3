"""What decays of state spaces start from, as in Mamba and Mamba-2."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def init_A_log(size: int) -> nn.Parameter:
    """Logarithms of decay rates, which are uniform in [1, 16]."""
    return nn.Parameter(torch.empty(size).uniform_(1, 16).log())


def init_dt_bias(size: int) -> Tensor:
    """Biases whose softplus, the step size, is log-uniform in [0.001, 0.1].

    >>> step = torch.nn.functional.softplus(init_dt_bias(100))
    >>> bool(step.min() > 0.0009 and step.max() < 0.1001)
    True
    """
    return torch.empty(size).uniform_(math.log(1e-3), math.log(1e-1)).exp().expm1().log()


def dt_linear(dim: int, size: int) -> nn.Linear:
    """A linear layer whose softplus is a step size: its biases start as :func:`init_dt_bias` says."""
    layer = nn.Linear(dim, size)
    with torch.no_grad():
        layer.bias.copy_(init_dt_bias(size))
    return layer
