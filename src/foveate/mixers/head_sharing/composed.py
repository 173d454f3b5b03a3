"""DCMHA: heads whose logits and weights are composed anew for every query and key."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from foveate.attention.composed import Composition, Factors, attend_composed
from foveate.cache.tokens import Tokens
from foveate.catalogue.registry import register
from foveate.mixers.attention import AttentionMixer
from foveate.mixers.base import StepOutput, join_heads
from foveate.patterns import Layout, causal
from foveate.precision import to_accum

SIDES = 4  # query and key before the softmax, query and key after it
Composed = tuple[Composition, Composition]


@register(
    "dcmha",
    papers=("DCMHA",),
    formula="o_i = Σ_j C'_ij(softmax_j(C_ij(q_i·k_j / √d))) v_j, C_ij = I + W(x_i) + W'(x_j) on heads",
    supports={"causal", "noncausal", "padding", "packed", "decode", "gqa"},
)
class DynamicallyComposedAttention(AttentionMixer):
    """Attention whose heads are mixed before and after the softmax, by matrices made of the query's and key's tokens.

    For a pair (i, j), the H logits become themselves, plus Σ_r read_r write_rᵀ and a gate of each head, once of x_i and
    once of x_j; so do the H weights. A token's factors come of a layer of 4 H GELU units for each of the four; what
    reads is normalised to mean square 1 over heads, gates are tanh of a linear map. ``static`` adds a learned (H, H)
    matrix, zero at first. A decoder keeps the factors of keys beside keys and values.

    Xiao, Meng, Li, Yuan, arXiv 2405.08553, with the initialisation of the authors' published PyTorch code, where the
    static matrix is an option too. Time is quadratic in the tokens and by definition, without a fused kernel.
    """

    def __init__(self, dim: int, heads: int = 8, *, rank: int = 2, static: bool = False, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        if rank < 1:
            raise ValueError(f"rank is how many vectors a token mixes heads by, at least 1; got {rank}")
        self.rank, hidden = rank, 4 * heads
        self.hidden = nn.Parameter(torch.randn(SIDES, dim, hidden) * math.sqrt(2 / (dim + hidden)))
        spread = 0.02 / (math.sqrt(2 * heads * rank) * (heads + rank))
        self.factors = nn.Parameter(torch.randn(SIDES, hidden, 2 * rank, heads) * spread)
        self.gates = nn.Parameter(torch.randn(SIDES, dim, heads) * 0.05 * math.sqrt(2 / (heads + dim)))
        self.base = nn.Parameter(torch.zeros(2, heads, heads)) if static else None

    def factors_of(self, x: Tensor) -> Tensor:
        """All factors of tokens x (B, N, C), in one tensor (B, 4, N, (2 r + 1) H)."""
        x = x.unsqueeze(1)
        made = gelu(x @ self.hidden) @ self.factors.flatten(2)  # (B, 4, N, 2 r H)
        read, write = made.unflatten(-1, (2 * self.rank, self.heads)).split(self.rank, dim=-2)
        read = (to_accum(read) * torch.rsqrt(to_accum(read).square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return torch.cat([read.flatten(3), write.flatten(3), torch.tanh(x @ self.gates)], dim=-1)

    def compositions(self, queries: Tensor, keys: Tensor) -> Composed:
        """Before and after the softmax, of the factors of queries and of keys."""
        made = []
        for number in (0, 1):
            sides = (self._side(queries[:, 2 * number]), self._side(keys[:, 2 * number + 1]))
            made.append(Composition(*sides, None if self.base is None else self.base[number]))
        return made[0], made[1]

    def _side(self, flat: Tensor) -> Factors:
        read, write, gate = flat.split([self.rank * self.heads, self.rank * self.heads, self.heads], dim=-1)
        by_rank = (self.rank, self.heads)
        return Factors(read.unflatten(-1, by_rank), write.unflatten(-1, by_rank), gate)

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        q, k, v = self.project(x, x)
        factors = self.factors_of(x)
        before, after = self.compositions(factors, factors)
        out = attend_composed(q, k, v, self.within(padding), before=before, after=after, layout=layout)
        return self.to_out(join_heads(out))

    # ---- decoding: the cache holds keys, values, and the factors of keys ------------------------------------

    def empty_state(self, batch: int, capacity: int | None) -> Tokens:  # type: ignore[override]
        return Tokens(batch, capacity)

    def mix_after(self, x: Tensor, state: Tokens) -> StepOutput:  # type: ignore[override]
        q, k, v = self.project(x, x, state.length)
        factors = self.factors_of(x)
        state = state.append(k, v, factors[:, 1::2])
        keys, values, kept = state.tensors
        before, after = self.compositions(factors, kept.repeat_interleave(2, dim=1))
        out = attend_composed(q, keys, values, causal, before=before, after=after)
        return StepOutput(self.to_out(join_heads(out)), state)

    def state_bytes(self, n: int) -> int:
        numbers = 2 * self.kv_heads * self.head_dim + 2 * (2 * self.rank + 1) * self.heads
        return n * numbers * self.weight.element_size()
