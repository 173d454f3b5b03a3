"""Linear attention that forgets what its input tells it to forget."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize, silu, softplus

from foveate.catalogue.registry import register
from foveate.mixers.base import divided, join_heads, split_heads
from foveate.mixers.recurrent import Inputs, RecurrentMixer
from foveate.precision import to_accum


class GatedNorm(nn.Module):
    """RMS norm of each head, times a SiLU gate made of the tokens."""

    def __init__(self, dim: int, heads: int, value_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(value_dim, eps=1e-5)
        self.to_gate = nn.Linear(dim, heads * value_dim, bias=bias)

    def forward(self, x: Tensor, heads: Tensor) -> Tensor:
        """(B, N, H * Dv) from tokens x (B, N, C) and heads (B, H, N, Dv)."""
        return join_heads(self.norm(heads)) * silu(self.to_gate(x))


@register(
    "gla",
    papers=("GLA",),
    formula="S_t = Diag(α_t) S_{t-1} + k_t v_tᵀ, α_t = σ(W_2 W_1 x_t + b)^(1/16)",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    notes="The norm of each head is an RMS norm, as in the authors' code; the paper writes a layer norm.",
)
class GLA(RecurrentMixer):
    """Linear attention in which every key channel of the state fades by a gate made of the token.

    Keys are half as wide as values, as in the paper; ``rank`` is that of the gate, ``temperature`` its root.

    >>> mixer = GLA(64, heads=4)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        rank: int = 16,
        temperature: float = 16.0,
        **options: Any,
    ) -> None:
        value_dim = value_dim or divided(dim, heads)
        super().__init__(dim, heads, head_dim=head_dim or max(1, value_dim // 2), value_dim=value_dim, **options)
        if not temperature > 0:
            raise ValueError(f"temperature is positive, 16 in the paper; got {temperature}")
        self.temperature = temperature
        self.to_rank = nn.Linear(dim, rank, bias=False)
        self.to_decay = nn.Linear(rank, self.kv_heads * self.head_dim)
        self.norm = GatedNorm(dim, heads, value_dim, bias=True)

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        logits = split_heads(self.to_decay(self.to_rank(x)), self.kv_heads)
        return Inputs(q, k, v, decay=logsigmoid(to_accum(logits)) / self.temperature)

    def read_out(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.to_out(self.norm(x, heads))


def fresh_rates(size: int) -> Tensor:
    """Decay rates to start from: uniform in [1, 16], as in Mamba2."""
    return torch.empty(size).uniform_(1, 16)


def small_steps(size: int) -> Tensor:
    """Biases to start from whose softplus, a time step, is log-uniform in [0.001, 0.1], as in Mamba2."""
    return torch.empty(size).uniform_(math.log(1e-3), math.log(1e-1)).exp().expm1().log()


@register(
    "gated_deltanet",
    papers=("Gated DeltaNet",),
    formula="S_t = α_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    notes="Padding lies at the ends of a sequence: inside it, the short convolutions would read it as zeros.",
)
class GatedDeltaNet(RecurrentMixer):
    """A state that fades as a whole by a gate, and in which each token overwrites what its key recalls.

    Queries, keys and values pass a short convolution; values are twice as wide as keys, as in the paper.

    >>> mixer = GatedDeltaNet(64, heads=4)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        conv: int = 4,
        **options: Any,
    ) -> None:
        head_dim = head_dim or divided(dim, heads)
        super().__init__(dim, heads, head_dim=head_dim, value_dim=value_dim or 2 * head_dim, conv=conv, **options)
        self.to_strength = nn.Linear(dim, self.kv_heads, bias=False)
        self.to_decay = nn.Linear(dim, self.kv_heads)
        self.A_log = nn.Parameter(fresh_rates(self.kv_heads).log())
        self.norm = GatedNorm(dim, heads, self.value_dim)
        with torch.no_grad():
            self.to_decay.bias.copy_(small_steps(self.kv_heads))

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        strength = torch.sigmoid(to_accum(self.to_strength(x))).transpose(1, 2)  # (B, G, N)
        dt = softplus(to_accum(self.to_decay(x))) * to_accum(self.A_log).exp()
        q, k = (normalize(to_accum(y), dim=-1, eps=1e-6) for y in (q, k))
        return Inputs(q, k, v, decay=-dt.transpose(1, 2), beta=strength)

    def read_out(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.to_out(self.norm(x, heads))
