"""Linear attention: a sum of outer products of keys and values, kept or fading at a constant rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm, silu

from foveate.attention import alibi_slopes
from foveate.catalogue.registry import register
from foveate.mixers.base import join_heads
from foveate.mixers.recurrent import Inputs, RecurrentMixer
from foveate.precision import accum_dtype, to_accum


def elu_plus_one(x: Tensor) -> Tensor:
    """``elu(x) + 1``, positive; as an exponential below 0, where the sum would cancel.

    >>> elu_plus_one(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0.3679, 1.0000, 3.0000])
    """
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


@register(
    "linear_transformer",
    papers=("Linear Transformer",),
    formula="o_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j φ(k_j)",
    supports={"causal", "noncausal", "cross", "padding", "packed", "decode", "gqa"},
)
class LinearTransformer(RecurrentMixer):
    """Attention whose weights are inner products of positive features, so that sums over keys become a state.

    ``feature_map`` turns queries and keys (..., D) into positive features (..., F).

    >>> mixer = LinearTransformer(64, heads=4)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        feature_map: Callable[[Tensor], Tensor] = elu_plus_one,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, **options)
        self.feature_map = feature_map
        self.num_features = feature_map(torch.zeros(1, self.head_dim)).shape[-1]

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        return self.summed(self.feature_map(q), self.feature_map(k), v)

    def summed(self, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        """Features and values, with a column of ones beside v, by which ``recur`` sums the keys."""
        return Inputs(q, k, pad(to_accum(v), (0, 1), value=1.0))  # the sum overflows float16 where outputs would not

    def read_out(self, x: Tensor, heads: Tensor) -> Tensor:
        return super().read_out(x, averaged(heads).to(x.dtype))

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.kv_heads, self.num_features, self.value_dim + 1


def averaged(heads: Tensor) -> Tensor:
    """Sums over keys (..., Dv), divided by the sum of the weights that their last channel holds; 0 where it is 0."""
    total, weight = heads[..., :-1], heads[..., -1:]
    blind = weight == 0  # no key, or all its features underflowed
    return torch.where(blind, 0, total / torch.where(blind, 1, weight))


@register(
    "lightning_attention_2",
    papers=("Lightning-Attention-2",),
    formula="S_t = λ_h S_{t-1} + k_t v_tᵀ, o_t = norm(q_tᵀ S_t) ⊙ u_t",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    notes=(
        "The paper fixes the tiling, a constant decay per head, and a norm instead of a denominator. Around "
        "it stands the block of TransNormerLLM (2307.14995), on which it was measured: SiLU features, an RMS "
        "norm without weights over all heads, a linear gate, ALiBi's slopes as decay rates."
    ),
)
class LightningAttention2(RecurrentMixer):
    """Linear attention in which each head fades at a constant rate of its own, normalised instead of divided.

    ``decay_scale`` multiplies the decay rates; TransNormerLLM lets it fall from 1 in the first layer to 0 in the
    last.

    >>> mixer = LightningAttention2(64, heads=4)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    def __init__(self, dim: int, heads: int = 8, *, decay_scale: float = 1.0, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        if not decay_scale >= 0:
            raise ValueError(f"decay_scale is a factor on the decay rates, 0 or more; got {decay_scale}")
        self.decay_scale = decay_scale
        self.to_gate = nn.Linear(dim, heads * self.value_dim, bias=False)

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        return Inputs(silu(q), silu(k), v, decay=self.decay(x))

    def decay(self, x: Tensor) -> Tensor:
        """Logarithm of what each head keeps of its state, (H,), in the dtype of x's state."""
        return -self.decay_scale * alibi_slopes(self.heads, dtype=accum_dtype(x.dtype), device=x.device)

    def read_out(self, x: Tensor, heads: Tensor) -> Tensor:
        flat = join_heads(heads)
        return self.to_out(rms_norm(flat, flat.shape[-1:], eps=1e-6) * self.to_gate(x))

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.heads, self.head_dim, self.value_dim
