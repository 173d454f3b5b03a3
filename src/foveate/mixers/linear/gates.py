"""What gated linear attentions share: the gated norm, and what decays start from."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate.mixers.base import join_heads


class GatedNorm(nn.Module):
    """RMS norm of each head, times a SiLU gate made of the tokens."""

    def __init__(self, dim: int, heads: int, value_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(value_dim, eps=1e-5)
        self.to_gate = nn.Linear(dim, heads * value_dim, bias=bias)

    def forward(self, x: Tensor, heads: Tensor) -> Tensor:
        """(B, N, H * Dv) from tokens x (B, N, C) and heads (B, H, N, Dv)."""
        return join_heads(self.norm(heads)) * silu(self.to_gate(x))


def fresh_rates(size: int) -> Tensor:
    """Decay rates to start from: uniform in [1, 16], as in Mamba2."""
    return torch.empty(size).uniform_(1, 16)


def small_steps(size: int) -> Tensor:
    """Biases to start from whose softplus, a time step, is log-uniform in [0.001, 0.1], as in Mamba2."""
    return torch.empty(size).uniform_(math.log(1e-3), math.log(1e-1)).exp().expm1().log()
