"""Linear attention with ReLU features and a depthwise convolution: L2ViT and LiT."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from foveate.catalogue.registry import register
from foveate.layers.local_conv import LocalConv
from foveate.layers.masked_ops import TINY, hide
from foveate.mixers.base import Mixer, divided, join_heads, split_heads
from foveate.patterns import Layout
from foveate.precision import to_accum
from foveate.recurrence import recur


def relu_attention(q: Tensor, k: Tensor, v: Tensor, *, least: float) -> Tensor:
    """Σ_j w_ij v_j / max(Σ_j w_ij, least) with w_ij = relu(q_i) · relu(k_j), in time linear in the tokens.

    q (B, H, N, D), k (B, H, M, D), v (B, H, M, Dv); out (B, H, N, Dv) in v's dtype. Sums are float32 at least, so
    that half precision does not overflow however many tokens there are.

    >>> q, k, v = torch.randn(3, 1, 2, 35, 8).unbind(0)
    >>> weights = q.relu() @ k.relu().transpose(2, 3)
    >>> expected = weights @ v / weights.sum(-1, keepdim=True).clamp_min(100)
    >>> torch.allclose(relu_attention(q, k, v, least=100), expected, atol=1e-5)
    True
    """
    out = recur(q.relu(), k.relu(), pad(to_accum(v), (0, 1), value=1.0), scale=1.0, causal=False).out
    return (out[..., :-1] / out[..., -1:].clamp_min(least)).to(v.dtype)


class ReluMixer(Mixer):
    """Projections around :func:`relu_attention`."""

    exempt: ClassVar[dict[str, str]] = {
        "differences": "a small move takes some of thousands of ReLUs across their kink"
    }

    def __init__(self, dim: int, heads: int, *, causal: bool) -> None:
        super().__init__(dim, causal=causal)
        self.heads, self.head_dim = heads, divided(dim, heads)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split_heads(self.to_qkv(x), 3 * self.heads).chunk(3, 1)
        return q, k, v


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

    >>> from foveate import Grid
    >>> mixer = L2ViTAttention(64, heads=4)
    >>> mixer(torch.randn(2, 35, 64), layout=Grid(5, 7)).shape
    torch.Size([2, 35, 64])
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


@register(
    "lit_attention",
    papers=("LiT",),
    formula="o_i = Σ_j w_ij v_j / Σ_j w_ij + DWConv(v)_i, w_ij = relu(q_i)·relu(k_j), few heads",
    supports={"noncausal", "padding", "grid"},
    notes="The recipe lit puts it into a trained diffusion transformer, which keeps all other weights.",
)
class LiTAttention(ReluMixer):
    """ReLU linear attention with few, wide heads, and a 5 x 5 depthwise convolution of the values beside it.

    >>> from foveate import Grid
    >>> mixer = LiTAttention(64, heads=2)
    >>> mixer(torch.randn(2, 35, 64), layout=Grid(5, 7)).shape
    torch.Size([2, 35, 64])
    """

    tiny: ClassVar[dict[str, Any]] = {"heads": 2}

    def __init__(self, dim: int, heads: int = 2, *, kernel: int = 5, axes: int = 2, causal: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.local = LocalConv(dim, kernel, axes=axes)

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        q, k, v = self.project(x)
        k, v = hide(k, padding), hide(v, padding)
        heads = relu_attention(q, k, v, least=TINY)
        return self.to_out(join_heads(heads) + self.local(join_heads(v), layout))
