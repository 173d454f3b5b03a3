"""SSA: softmax attention with a temperature of each query and a scale of each value."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from foveate.catalogue.registry import register
from foveate.layers.lengths import keys_seen
from foveate.mixers.attention import AttentionMixer
from foveate.mixers.base import join_heads
from foveate.patterns import Layout
from foveate.precision import to_accum


@register(
    "ssa",
    papers=("SSA (Selective Self-Attention)",),
    formula="o_i = Σ_j softmax_j(κ_i q_i·k_j / √d) (1 + tanh f'(v_j)) v_j, κ_i = 1 + tanh f(q_i) + e^{-e^β} log i",
    supports={"causal", "noncausal", "padding", "packed", "decode", "gqa"},
)
class SelectiveSelfAttention(AttentionMixer):
    """Softmax attention whose queries have inverse temperatures of their own, and whose values have scales.

    A query's inverse temperature κ is 1, plus tanh of a function of the query (``token``), plus a learned share of
    log n (``position``), n the number of keys that it sees; values are scaled by 1 plus tanh of a function of
    themselves (``values``). The functions share the projections of queries and values: f(q) = w·gelu(q), a vector w of
    each head, zero at first, so that C parameters are new for queries and as many for values. With all three switched
    off it is plain attention.

    Zhang, Chang, Li, Roy-Chowdhury, Chen, Oymak, Selective Attention, arXiv 2411.12892. The position term and its
    initial β are those of the authors' published code, which has no other term; there e^{-e^β} stands where the paper
    has a sigmoid. That the functions begin with the projections follows the abstract's "weight sharing"; their
    activation is ours.
    """

    full_budget: ClassVar[dict[str, Any] | None] = {"token": False, "position": False, "values": False}

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        token: bool = True,
        position: bool = True,
        values: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, **options)
        self.of_query = nn.Parameter(torch.zeros(self.heads, self.head_dim)) if token else None
        self.of_value = nn.Parameter(torch.zeros(self.kv_heads, self.head_dim)) if values else None
        self.beta = nn.Parameter(torch.tensor(1.5)) if position else None

    def project(self, x: Tensor, context: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        counts = torch.arange(first + 1, first + 1 + x.shape[1], device=x.device).unsqueeze(0)
        return self.tempered(x, counts if self.causal else torch.full_like(counts, first + x.shape[1]), first)

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        q, k, v = self.tempered(x, keys_seen(x, self.causal, layout, padding))
        return self.to_out(join_heads(self.attend(q, k, v, self.within(padding), layout)))

    def tempered(self, x: Tensor, counts: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Heads of tokens that see ``counts`` (B or 1, N) keys: queries times κ, values times their scales."""
        q, k, v = self.heads_of(x, x)
        kappa = to_accum(gated(q, self.of_query))
        if self.beta is not None:
            slope = torch.exp(-torch.exp(to_accum(self.beta)))
            kappa = kappa + slope * counts.clamp_min(1).to(kappa.dtype).log()[:, None, :, None]
        return self.rotated((q * kappa).to(q.dtype), k, (v * gated(v, self.of_value)).to(v.dtype), first)


def gated(x: Tensor, vectors: Tensor | None) -> Tensor:
    """1 + tanh(w_h·gelu(x)) of heads x (B, H, N, D), (B, H, N, 1); 1 where there is no w."""
    if vectors is None:
        return torch.ones((), dtype=x.dtype, device=x.device)
    return 1 + torch.tanh((gelu(x) * vectors.unsqueeze(1)).sum(-1, keepdim=True))
