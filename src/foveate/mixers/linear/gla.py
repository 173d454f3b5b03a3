"""GLA: linear attention in which every key channel of the state decays by a gate made of the token."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from foveate.catalogue.registry import register
from foveate.mixers.base import divided, split_heads
from foveate.mixers.linear.gates import GatedNorm
from foveate.mixers.recurrent import Inputs, RecurrentMixer
from foveate.precision import to_accum


@register(
    "gla",
    papers=("GLA",),
    formula="S_t = Diag(α_t) S_{t-1} + k_t v_tᵀ, α_t = σ(W_2 W_1 x_t + b)^(1/16)",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    notes="The norm of each head is an RMS norm, as in the authors' code; the paper writes a layer norm.",
)
class GLA(RecurrentMixer):
    """Linear attention in which every key channel of the state fades by a gate made of the token.

    Keys are half as wide as values, as in the paper; ``rank`` is that of the gate, ``temperature`` its root.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        rank: int = 16,
        temperature: float = 16.0,
        **options: Any,
    ) -> None:
        value_dim = value_dim or divided(dim, heads)
        super().__init__(dim, heads, head_dim=head_dim or max(1, value_dim // 2), value_dim=value_dim, **options)
        if not temperature > 0:
            raise ValueError(f"temperature is positive, 16 in the paper; got {temperature}")
        self.temperature = temperature
        self.to_rank = nn.Linear(dim, rank, bias=False)
        self.to_decay = nn.Linear(rank, self.kv_heads * self.head_dim)
        self.norm = GatedNorm(dim, heads, value_dim, bias=True)

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        logits = split_heads(self.to_decay(self.to_rank(x)), self.kv_heads)
        return Inputs(q, k, v, decay=logsigmoid(to_accum(logits)) / self.temperature)

    def read_out(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.to_out(self.norm(x, heads))
