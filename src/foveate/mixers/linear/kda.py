"""Kimi Delta Attention: the delta rule with a decay of every key channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from foveate.catalogue.registry import register
from foveate.mixers.base import join_heads, split_heads
from foveate.mixers.linear.deltanet import DeltaNet, unit
from foveate.mixers.linear.gates import fresh_rates, small_steps
from foveate.mixers.recurrent import Inputs
from foveate.precision import to_accum


@register(
    "kda",
    reference="Kimi Linear",
    formula="S_t = (I - β_t k_t k_tᵀ) Diag(α_t) S_{t-1} + β_t k_t v_tᵀ",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    notes="Kimi Delta Attention, the linear layers of Kimi Linear; its other layers are full attention (MLA).",
)
class KDA(DeltaNet):
    """The delta rule on a state of which every key channel fades by a gate of its own.

    Decays and the output's sigmoid gate come out of ``rank`` channels (by default as many as a head has).
    """

    def __init__(self, dim: int, heads: int = 8, *, rank: int | None = None, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        rank, channels = rank or self.value_dim, self.kv_heads * self.head_dim
        to_decay = nn.Linear(rank, channels)
        with torch.no_grad():
            to_decay.bias.copy_(small_steps(channels))
        self.to_decay = nn.Sequential(nn.Linear(dim, rank, bias=False), to_decay)
        self.A_log = nn.Parameter(fresh_rates(self.kv_heads).log())
        self.to_gate = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, heads * self.value_dim))

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        dt = split_heads(softplus(to_accum(self.to_decay(x))), self.kv_heads)  # (B, G, N, D)
        decay = -dt * to_accum(self.A_log).exp()[:, None, None]
        return Inputs(unit(q), unit(k), v, decay=decay, beta=self.strength(x).transpose(1, 2))

    def read_out(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.to_out(join_heads(self.norm(heads)) * torch.sigmoid(self.to_gate(x)))
