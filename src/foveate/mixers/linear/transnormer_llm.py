"""TransNormerLLM: linear attention with a constant decay per head and LRPE positions."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate.catalogue.registry import register
from foveate.mixers.linear.lightning_attention import LightningAttention2, LightningOptions
from foveate.mixers.linear.positions import Positioned
from foveate.mixers.recurrent import Inputs
from foveate.precision import to_accum


@register(
    "transnormer_llm",
    papers=("TransNormerLLM",),
    formula="o_t = norm(Σ_{s≤t} λ_h^(t-s) Σ_c q_tc k_sc cos((t - s) θ_c) v_s) ⊙ u_t",
    notes=(
        "lrpe=False is what the paper has in all layers but the first, the decay alone (lightning_attention). The "
        "decoder keeps the faded state and never forms λ^-t. The model transnormer is built of it."
    ),
)
class TransNormerLLM(LightningAttention2, Positioned):
    """Linear attention with a constant decay per head and LRPE, a rotation of each channel by a learned angle."""

    def __init__(self, dim: int, heads: int = 8, *, lrpe: bool = True, **options: Unpack[LightningOptions]) -> None:
        super().__init__(dim, heads, **options)
        channels = self.kv_heads * self.head_dim
        angles = 10_000.0 ** (-2 * torch.arange(channels) / channels)  # over all heads, as in the authors' code
        self.angles = nn.Parameter(angles.view(self.kv_heads, self.head_dim)) if lrpe else None

    def positioned(self, x: Tensor, positions: Tensor) -> Tensor:
        x = silu(x)
        if self.angles is None:
            return x
        angles = self.angles.double().repeat_interleave(x.shape[1] // self.kv_heads, dim=0)  # (H or G, D)
        turned = positions[:, None] * angles.unsqueeze(1)  # exact at any position
        cos, sin = turned.cos().to(to_accum(x).dtype), turned.sin().to(to_accum(x).dtype)
        return torch.cat([x * cos, x * sin], dim=-1)

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        return Inputs(q, k, v, decay=self.decay(x), scale=self.head_dim**-0.5)
