"""Additive attention: tokens are summed up in one global vector, which every token multiplies."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from foveate.catalogue.registry import register
from foveate.layers.masked_ops import softmax_over_tokens
from foveate.mixers.base import Mixer, divided, split_heads
from foveate.patterns import Layout
from foveate.precision import to_accum


class AdditiveMixer(Mixer):
    """What both have: two projections, and costs that are their linear layers and a few products per channel."""

    def __init__(self, dim: int, *, causal: bool) -> None:
        super().__init__(dim, causal=causal)
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)


@register(
    "fastformer",
    papers=("Fastformer",),
    formula="q = Σ_i softmax_i(w·q_i/√d) q_i, p_i = q ⊙ k_i, k = Σ_i softmax_i(u·p_i/√d) p_i, o_i = W(k ⊙ q_i) + q_i",
    supports={"noncausal", "padding"},
    notes="Values share the queries' projection and the scores see all heads' channels, as in the paper and its code.",
)
class Fastformer(AdditiveMixer):
    """A weighted mean of the queries multiplies the keys, and a weighted mean of those products multiplies the values.

    >>> mixer = Fastformer(64, heads=4)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    def __init__(self, dim: int, heads: int = 8, *, causal: bool = False) -> None:
        super().__init__(dim, causal=causal)
        self.heads, self.head_dim = heads, divided(dim, heads)
        self.score_q = nn.Linear(dim, heads)
        self.score_p = nn.Linear(dim, heads)
        self.transform = nn.Linear(dim, dim)

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        q, k = self.to_q(x), self.to_k(x)
        p = k * self.pooled(q, self.score_q(q), padding)
        return self.transform(q * self.pooled(p, self.score_p(p), padding)) + q

    def pooled(self, x: Tensor, scores: Tensor, key_mask: Tensor | None) -> Tensor:
        """Mean over the real tokens of x (B, N, C), weighted per head by the softmax of ``scores`` (B, N, H)."""
        shown = None if key_mask is None else key_mask.unsqueeze(-1)
        weights = softmax_over_tokens(to_accum(scores) * self.head_dim**-0.5, shown, dim=1)
        hidden = x if shown is None else x.masked_fill(~shown, 0)
        mean = weights.transpose(1, 2).unsqueeze(2).to(x.dtype) @ split_heads(hidden, self.heads)  # (B, H, 1, D)
        return mean.transpose(1, 2).flatten(2)


@register(
    "efficient_additive_attention",
    papers=("SwiftFormer",),
    formula="a = α / ‖α‖₂, α_i = w·q_i / √d, g = Σ_i a_i q_i, o_i = W₂(W₁(g ⊙ k_i) + q_i), ‖q_i‖ = ‖k_i‖ = 1",
    supports={"noncausal", "padding", "grid"},
    notes="Positions do not matter to it: a layout changes nothing. The model swiftformer is built of it.",
)
class EfficientAdditiveAttention(AdditiveMixer):
    """One global query, a weighted sum of the unit queries, multiplies every unit key; no keys meet values.

    >>> mixer = EfficientAdditiveAttention(64)
    >>> mixer(torch.randn(2, 49, 64)).shape
    torch.Size([2, 49, 64])
    """

    def __init__(self, dim: int, *, causal: bool = False) -> None:
        super().__init__(dim, causal=causal)
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
