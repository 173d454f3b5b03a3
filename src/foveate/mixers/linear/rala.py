"""RALA: linear attention with weighted keys and gated outputs, of higher rank."""

from __future__ import annotations

from torch import Tensor

from foveate.catalogue.registry import register
from foveate.layers.masked_ops import TINY, count, hide, softmax_over_tokens
from foveate.mixers.linear.gated_grid import GatedGridMixer
from foveate.patterns import Layout
from foveate.precision import to_accum
from foveate.recurrence import recur


@register(
    "rala",
    papers=("RALA / RAVLT",),
    formula="o_i = g(x_i) ⊙ φ(q_i)ᵀ Σ_j α_j φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j α_j φ(k_j), α = N softmax_j(φ̄(q)·φ(k_j) / √d)",
    supports={"noncausal", "padding", "grid"},
    notes="The 5 x 5 convolution of values before g, and rotary positions outside the divisor, are the authors'.",
)
class RankAugmentedLinearAttention(GatedGridMixer):
    """Linear attention whose keys are weighted by a softmax of their products with the mean query; outputs are gated.

    Both raise ranks that plain linear attention keeps low: of the sum of k v^T, where many tokens are alike, and of
    the outputs, which a gate of the tokens themselves multiplies.
    """

    def attention(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout | None, key_mask: Tensor | None) -> Tensor:
        number = count(key_mask, k.shape[2])
        k = k * self.key_weights(q, k, key_mask)
        size = q @ k.sum(2, keepdim=True).transpose(2, 3) / number
        turned = (self.turn(q, layout), self.turn(k, layout))
        return recur(*turned, to_accum(v) / number, scale=1.0, causal=False).out / size.clamp_min(TINY)

    def key_weights(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """α (B, H, N, 1): N times the softmax over the keys of their products with the mean query."""
        number = count(key_mask, k.shape[2])
        mean = hide(q, key_mask).sum(2, keepdim=True) / number
        scores = k @ mean.transpose(2, 3) * self.head_dim**-0.5
        shown = None if key_mask is None else key_mask[:, None, :, None]
        return number * softmax_over_tokens(scores, shown, dim=2)
