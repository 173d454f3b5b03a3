"""Lightning Attention 1 and 2: linear attention with a constant decay per head, normalised instead of divided."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from foveate.attention import alibi_slopes
from foveate.catalogue.registry import register
from foveate.mixers.base import join_heads
from foveate.mixers.recurrent import Inputs, RecurOptions, RecurrentMixer
from foveate.precision import accum_dtype


class LightningOptions(RecurOptions, total=False):
    """What :class:`LightningAttention2` takes beside the width and the number of heads."""

    decay_scale: float


@register(
    "lightning_attention_2",
    papers=("Lightning-Attention-2",),
    formula="S_t = λ_h S_{t-1} + k_t v_tᵀ, o_t = norm(q_tᵀ S_t) ⊙ u_t",
    notes="The paper fixes tiling, decay and norm; the block around them is TransNormerLLM's, arXiv 2307.14995.",
)
class LightningAttention2(RecurrentMixer):
    """Linear attention in which each head decays at a constant rate of its own, normalised instead of divided.

    ``decay_scale`` multiplies the decay rates; TransNormerLLM lets it fall from 1 in the first layer to 0 in the
    last.
    """

    def __init__(self, dim: int, heads: int = 8, *, decay_scale: float = 1.0, **more: Unpack[RecurOptions]) -> None:
        super().__init__(dim, heads, **more)
        if not decay_scale >= 0:
            raise ValueError(f"decay_scale is a factor on the decay rates, 0 or more; got {decay_scale}")
        self.decay_scale, self.to_gate = decay_scale, nn.Linear(dim, heads * self.value_dim, bias=False)

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        return Inputs(silu(q), silu(k), v, decay=self.decay(x))

    def decay(self, x: Tensor) -> Tensor:
        """Logarithm of what each head keeps of its state, (H,), in the dtype of x's state."""
        return -self.decay_scale * alibi_slopes(self.heads, dtype=accum_dtype(x.dtype), device=x.device)

    def read_out(self, x: Tensor, heads: Tensor) -> Tensor:
        flat = join_heads(heads)
        return self.to_out(rms_norm(flat, flat.shape[-1:], eps=1e-6) * self.to_gate(x))


@register(
    "lightning_attention",
    papers=("Lightning-Attention-TNL",),
    formula="S_t = λ_h S_{t-1} + k_t v_tᵀ, o_t = norm(q_tᵀ S_t) ⊙ u_t",
    notes="The block is TNL's. Its attention is that of Lightning Attention-2, and so is the code.",
)
class LightningAttention(LightningAttention2):
    """TNL's token mixer: linear attention with a constant decay per head and layer, RMS norm and a gate."""
