"""L2ViT: ReLU linear attention, then convolutions that concentrate it locally."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from foveate.catalogue.registry import register
from foveate.layers.local_conv import LocalConv
from foveate.mixers.base import join_heads
from foveate.mixers.linear.relu import ReluMixer, relu_attention
from foveate.patterns import Layout


class LocalConcentration(nn.Module):
    """L2ViT's local concentration: a depthwise convolution, GELU, a batch norm, another depthwise convolution.

    >>> LocalConcentration(6)(torch.randn(2, 35, 6)).shape
    torch.Size([2, 35, 6])
    """

    def __init__(self, dim: int, kernel: int = 7, *, axes: int = 2) -> None:
        super().__init__()
        self.first = LocalConv(dim, kernel, axes=axes)
        self.norm = nn.BatchNorm1d(dim)
        self.second = LocalConv(dim, kernel, axes=axes)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        hidden = gelu(self.first(x, layout))
        return self.second(self.norm(hidden.flatten(0, 1)).view_as(hidden), layout)


@register(
    "l2vit_attention",
    papers=("L2ViT",),
    formula="a_i = τ Σ_j w_ij v_j / max(Σ_j w_ij, 100), w_ij = relu(q_i)·relu(k_j), o = a + DW(BN(gelu(DW(norm(a)))))",
    supports={"noncausal", "grid"},
    notes=(
        "The paper adds the local concentration to the residual stream after the attention. So does "
        "the model l2vit (concentrate=False here), with exact attention in windows in every other block."
    ),
)
class L2ViTAttention(ReluMixer):
    """ReLU linear attention with a divisor of at least 100, then two 7 x 7 convolutions that concentrate it locally.

    ``concentrate=False`` leaves out the convolutions, ``least`` is the bound on the divisor. τ is learned, one per
    head.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        concentrate: bool = True,
        kernel: int = 7,
        least: float = 100.0,
        axes: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        if not least > 0:
            raise ValueError(f"least is what the divisor is at least, above 0; got {least}")
        self.least = least
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), self.head_dim**-0.5))
        self.norm = nn.LayerNorm(dim) if concentrate else None
        self.local = LocalConcentration(dim, kernel, axes=axes) if concentrate else None

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        heads = relu_attention(*self.project(x), least=self.least) * self.temperature
        out = self.to_out(join_heads(heads))
        if self.local is None or self.norm is None:
            return out
        return out + self.local(self.norm(out), layout)
