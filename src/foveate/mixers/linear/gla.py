"""GLA: linear attention in which every key channel of the state decays by a gate made of the token."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from foveate.catalogue.registry import register
from foveate.mixers.base import split_heads
from foveate.mixers.linear.gates import GatedMixer, GatedNorm
from foveate.mixers.recurrent import Inputs, RecurOptions, narrow_keys
from foveate.precision import to_accum


@register(
    "gla",
    papers=("GLA",),
    formula="S_t = Diag(α_t) S_{t-1} + k_t v_tᵀ, α_t = σ(W_2 W_1 x_t + b)^(1/16)",
    notes="The norm of each head is an RMS norm, as in the authors' code; the paper writes a layer norm.",
)
class GLA(GatedMixer):
    """Linear attention in which every key channel of the state decays by a gate made of the token.

    Keys are half as wide as values, as in the paper; ``rank`` is that of the gate, ``temperature`` its root.
    """

    widths = narrow_keys

    def __init__(
        self, dim: int, heads: int = 8, *, rank: int = 16, temperature: float = 16.0, **options: Unpack[RecurOptions]
    ) -> None:
        super().__init__(dim, heads, **options)
        if not temperature > 0:
            raise ValueError(f"temperature is positive, 16 in the paper; got {temperature}")
        self.temperature = temperature
        self.to_rank = nn.Linear(dim, rank, bias=False)
        self.to_decay = nn.Linear(rank, self.kv_heads * self.head_dim)
        self.norm = GatedNorm(dim, heads, self.value_dim, bias=True)

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        logits = split_heads(self.to_decay(self.to_rank(x)), self.kv_heads)
        return Inputs(q, k, v, decay=logsigmoid(to_accum(logits)) / self.temperature)
