"""Retention (RetNet): linear attention with a constant decay per head and rotary positions."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from foveate.catalogue.registry import register
from foveate.layers.rotary import rotate
from foveate.mixers.base import join_heads
from foveate.mixers.linear.positions import Positioned
from foveate.mixers.recurrent import Inputs, RecurOptions, wide_values


@register(
    "retention",
    reference="RetNet",
    formula="o_n = GN(Σ_{m≤n} γ_h^(n-m) (q_n e^{inθ}) (k_m e^{imθ})^† v_m) ⊙ silu(W_G x_n), γ_h = 1 - 2^(-5-h)",
    notes="The norm takes the place of the paper's three normalisations, which it undoes up to its epsilon.",
)
class Retention(Positioned):
    """Linear attention with rotary positions in which the state of head h decays by 1 - 2^(-5-h) at each token.

    Values are twice as wide as keys, as in the paper; each head is normalised, then gated.
    """

    widths = wide_values

    def __init__(self, dim: int, heads: int = 8, *, rotary: float = 10_000.0, **options: Unpack[RecurOptions]) -> None:
        super().__init__(dim, heads, **options)
        self.rotary = rotary
        self.to_gate = nn.Linear(dim, heads * self.value_dim, bias=False)

    def positioned(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, positions, self.rotary)

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        forgotten = 2.0 ** -(5.0 + torch.arange(self.heads, dtype=torch.float64, device=x.device))
        return Inputs(q, k, v, decay=torch.log1p(-forgotten))

    def read_out(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.to_out(join_heads(layer_norm(heads, heads.shape[-1:])) * silu(self.to_gate(x)))
