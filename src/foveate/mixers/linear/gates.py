"""Recurrent mixers whose outputs are normalised head by head and gated by the tokens."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu

from foveate.mixers.base import join_heads
from foveate.mixers.recurrent import RecurrentMixer


class GatedNorm(nn.Module):
    """RMS norm of each head, times a SiLU gate made of the tokens."""

    def __init__(self, dim: int, heads: int, value_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(value_dim, eps=1e-5)
        self.to_gate = nn.Linear(dim, heads * value_dim, bias=bias)

    def forward(self, x: Tensor, heads: Tensor) -> Tensor:
        """(B, N, H * Dv) from tokens x (B, N, C) and heads (B, H, N, Dv)."""
        return join_heads(self.norm(heads)) * silu(self.to_gate(x))


class GatedMixer(RecurrentMixer):
    """A recurrent mixer whose heads pass a :class:`GatedNorm` before the output projection."""

    norm: GatedNorm

    def read_out(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.to_out(self.norm(x, heads))
