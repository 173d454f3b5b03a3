"""Hedgehog: linear attention whose feature maps are trained to mimic the weights of softmax attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Unpack

import torch
from torch import Tensor, nn

from foveate.catalogue.registry import register
from foveate.layers.rotary import rotate
from foveate.mixers.attention import AttentionMixer
from foveate.mixers.core import PatternCore
from foveate.mixers.linear.linear_transformer import LinearTransformer
from foveate.mixers.linear.positions import Positioned
from foveate.mixers.recurrent import Inputs, RecurOptions
from foveate.patterns import Layout, full
from foveate.precision import to_accum

FARTHEST = 30.0  # features are exponentials of at most this: products of two and sums of them stay finite


class HedgehogMap(nn.Module):
    """Features [exp(W x + b), exp(-W x - b)] (B, H, N, 2 D) of x (B, H, N, D), W and b of each head's own.

    W starts as the identity. The exponents are cut off at 30 and -30.

    >>> HedgehogMap(heads=4, head_dim=16)(torch.randn(2, 4, 9, 16)).shape
    torch.Size([2, 4, 9, 32])
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))
        self.shift = nn.Parameter(torch.zeros(heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        exponents = to_accum(x @ self.turn.mT + self.shift.unsqueeze(1)).clamp(-FARTHEST, FARTHEST)
        return torch.cat([exponents, -exponents], dim=-1).exp()


class HedgehogMaps(nn.Module):
    """A map for queries and one for keys."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.q, self.k = HedgehogMap(heads, head_dim), HedgehogMap(kv_heads, head_dim)


@register(
    "hedgehog",
    papers=("Hedgehog",),
    formula="o_i = φ(q_i)ᵀ Σ_j ψ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j ψ(k_j), φ(x) = [exp(Wx + b), exp(-Wx - b)]",
    notes="mimic trains the maps on queries and keys of a softmax attention; linearised starts from its projections.",
)
class Hedgehog(LinearTransformer, Positioned):
    """Linear attention with learned exponential features, which can be as spiky as softmax attention.

    ``rotary`` is the base of rotary positions, turned before the maps, which then see where a token lies: padding
    is then on the right.
    """

    def __init__(self, dim: int, heads: int = 8, *, rotary: float | None = None, **more: Unpack[RecurOptions]) -> None:
        super().__init__(dim, heads, **more)
        self.rotary, self.num_features = rotary, 2 * self.head_dim
        self.maps = HedgehogMaps(heads, self.kv_heads, self.head_dim)

    def check(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> None:
        super().check(x, context, layout, padding)
        if self.rotary is not None and padding is not None and bool((padding[:, 1:] > padding[:, :-1]).any()):
            raise ValueError("with rotary positions hedgehog counts tokens from the left: pad on the right")

    def positioned(self, x: Tensor, positions: Tensor) -> Tensor:
        return x if self.rotary is None else rotate(x, positions, self.rotary)

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        return self.summed(self.maps.q(q), self.maps.k(k), v)


def linearised(attention: AttentionMixer) -> Hedgehog:
    """A Hedgehog with the projections of plain softmax attention, its maps still to be trained by ``mimic``.

    >>> from foveate.mixers.exact_io.flash_attention import FlashAttention
    >>> attention = FlashAttention(64, heads=4, rotary=10_000.0)
    >>> linearised(attention)(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])

    Raises ValueError for attention over less than everything: its weights are not those that ``mimic`` aims at.
    """
    if not isinstance(attention.core, PatternCore) or attention.core.pattern != full:
        raise ValueError(f"only plain attention is linearised; got one whose core is {attention.core}")
    options = {name: getattr(attention, name) for name in ("kv_heads", "head_dim", "rotary", "causal")}
    mixer = Hedgehog(attention.dim, attention.heads, **options).to(attention.weight)
    mixer.load_state_dict(attention.state_dict(), strict=False)
    return mixer


def mimic(
    maps: HedgehogMaps, samples: Iterable[tuple[Tensor, Tensor]], *, causal: bool = True, lr: float = 0.02
) -> list[float]:
    """Train feature maps, and nothing else, so that linear attention has the weights of softmax attention.

    Each sample is a pair of queries (B, H, N, D) and keys (B, G, N, D) of an attention layer, as they enter it
    (rotated, if it is rotary); one step of Adam is taken on each. Returns the cross-entropies of the linear weights
    under the softmax weights, before each step. Weights are formed in full here: N should be some hundreds.

    >>> maps = HedgehogMaps(heads=4, kv_heads=4, head_dim=16)
    >>> q, k = 2 * torch.randn(2, 3, 4, 32, 16)
    >>> losses = mimic(maps, [(q, k)] * 20)
    >>> losses[-1] < losses[0]
    True
    """
    optimizer = torch.optim.Adam(maps.parameters(), lr=lr)
    losses = []
    for q, k in samples:
        q, k = q.detach(), k.detach()
        with torch.enable_grad():
            loss = cross_entropy(
                softmax_weights(q, k, causal=causal), linear_weights(maps.q(q), maps.k(k), causal=causal)
            )
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def softmax_weights(q: Tensor, k: Tensor, *, causal: bool = True) -> Tensor:
    """Weights (B, H, N, N) of softmax attention."""
    logits = q.shape[-1] ** -0.5 * q @ _repeated(k, q).mT
    if causal:
        logits = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), -torch.inf)
    return logits.softmax(-1)


def linear_weights(q: Tensor, k: Tensor, *, causal: bool = True) -> Tensor:
    """Weights (B, H, N, N) of linear attention with positive features q (B, H, N, F) and k (B, G, N, F)."""
    products = q @ _repeated(k, q).mT
    products = products.tril() if causal else products
    return products / products.sum(-1, keepdim=True)


def cross_entropy(target: Tensor, weights: Tensor) -> Tensor:
    """Mean over rows of -sum_j target_ij log weights_ij; less the target's own entropy, it is the KL divergence.

    >>> even = torch.full((1, 1, 2, 2), 0.5)
    >>> cross_entropy(even, even)
    tensor(0.6931)
    """
    least = torch.finfo(weights.dtype).tiny
    return -(target * weights.clamp(min=least).log()).sum(-1).mean()


def _repeated(k: Tensor, q: Tensor) -> Tensor:
    return k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
