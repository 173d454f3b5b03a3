"""LiT: ReLU linear attention with few heads and a convolution of the values."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from foveate.catalogue.registry import register
from foveate.layers.local_conv import LocalConv
from foveate.layers.masked_ops import TINY, hide
from foveate.mixers.base import join_heads
from foveate.mixers.linear.relu import ReluMixer, relu_attention
from foveate.patterns import Layout


@register(
    "lit_attention",
    papers=("LiT",),
    formula="o_i = Σ_j w_ij v_j / Σ_j w_ij + DWConv(v)_i, w_ij = relu(q_i)·relu(k_j), few heads",
    supports={"noncausal", "padding", "grid"},
    notes="The recipe lit puts it into a trained diffusion transformer, which keeps all other weights.",
)
class LiTAttention(ReluMixer):
    """ReLU linear attention with few, wide heads, and a 5 x 5 depthwise convolution of the values beside it."""

    tiny: ClassVar[dict[str, Any]] = {"heads": 2}

    def __init__(self, dim: int, heads: int = 2, *, kernel: int = 5, axes: int = 2, causal: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.local = LocalConv(dim, kernel, axes=axes)

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        q, k, v = self.project(x)
        k, v = hide(k, padding), hide(v, padding)
        heads = relu_attention(q, k, v, least=TINY)
        return self.to_out(join_heads(heads) + self.local(join_heads(v), layout))
