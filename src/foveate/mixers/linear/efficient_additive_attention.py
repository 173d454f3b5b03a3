"""Efficient additive attention (SwiftFormer): one global query multiplies every key."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from foveate.catalogue.registry import register
from foveate.mixers.base import Mixer
from foveate.patterns import Layout
from foveate.precision import to_accum


@register(
    "efficient_additive_attention",
    papers=("SwiftFormer",),
    formula="a = α / ‖α‖₂, α_i = w·q_i / √d, g = Σ_i a_i q_i, o_i = W₂(W₁(g ⊙ k_i) + q_i), ‖q_i‖ = ‖k_i‖ = 1",
    supports={"noncausal", "padding", "grid"},
    notes="Positions do not matter to it: a layout changes nothing. The model swiftformer is built of it.",
)
class EfficientAdditiveAttention(Mixer):
    """One global query, a weighted sum of the unit queries, multiplies every unit key; no keys meet values."""

    def __init__(self, dim: int, *, causal: bool = False) -> None:
        super().__init__(dim, causal=causal)
        self.to_q, self.to_k = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.score = nn.Parameter(torch.randn(dim))
        self.project = nn.Linear(dim, dim)
        self.to_out = nn.Linear(dim, dim)

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        q, k = normalize(self.to_q(x), dim=-1), normalize(self.to_k(x), dim=-1)
        scores = to_accum(q @ self.score) * self.dim**-0.5  # (B, N)
        if padding is not None:
            scores = scores.masked_fill(~padding, 0)
        weights = normalize(scores, dim=1).to(q.dtype).unsqueeze(1)
        summed = weights @ (q if padding is None else q.masked_fill(~padding.unsqueeze(-1), 0))  # (B, 1, C)
        return self.to_out(self.project(summed * k) + q)
