"""Gated DeltaNet: the delta rule on a state that decays as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from foveate.catalogue.registry import register
from foveate.mixers.base import divided
from foveate.mixers.linear.gates import GatedNorm, fresh_rates, small_steps
from foveate.mixers.recurrent import Inputs, RecurrentMixer
from foveate.precision import to_accum


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
