"""Lasformer: lightweight attention of few channels selects the tokens that full attention reads."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.cache import KVCache
from foveate.catalogue.registry import register
from foveate.layers.taking import take
from foveate.mixers.attention import JUMPS, AttentionMixer
from foveate.mixers.base import StepOutput, join_heads, split_heads
from foveate.patterns import Layout
from foveate.patterns.rules.choose import NEVER, score, slices
from foveate.precision import to_accum


@register(
    "lasformer",
    papers=("Lasformer",),
    formula="o_i = Σ_{j ∈ S_i} softmax_j(q_i·k_j / √d) v_j, S_i: the keys of the greatest q'_i·k'_j, q' and k' narrow",
    supports={"causal", "noncausal", "cross", "padding", "packed", "decode", "gqa"},
    notes="The selector learns by selection_loss alone.",
)
class Lasformer(AttentionMixer):
    """Attention to the ``keep`` keys that a selector scores best; its queries and keys have ``select_dim`` channels.

    Scores of all pairs are formed of few channels, a few queries at a time, and full attention of the chosen keys
    alone, which are gathered: O(n² select_dim + n keep d). Self-attention of encoder and decoder and cross-attention
    alike. :meth:`selection_loss` teaches the selector what full attention reads. The paper raises the sparsity while it
    trains: ``keep`` may be lowered at any time. It gives no code, and is followed as far as its abstract says; that
    selectors are one a head, without positions, and learn by the divergence of their softmax, is our reading.

    >>> mixer = Lasformer(64, heads=4, keep=5, causal=False)
    >>> words, source = torch.randn(2, 9, 64), torch.randn(2, 50, 64)
    >>> mixer.selection_loss(words, context=source).backward()  # of the selector's parameters alone
    >>> mixer(words, context=source).shape
    torch.Size([2, 9, 64])
    """

    one_by_one: ClassVar[bool] = True  # of self-attention: contexts are read one by one in ``mix``
    tiny: ClassVar[dict[str, Any]] = {"keep": 5, "select_dim": 3}
    full_budget: ClassVar[dict[str, Any] | None] = {"keep": 1 << 20}
    exempt: ClassVar[dict[str, str]] = {
        "gradients": "the selector chooses: it learns by selection_loss, and outputs have no gradient to it",
        **JUMPS,
    }

    def __init__(self, dim: int, heads: int = 8, *, keep: int = 64, select_dim: int = 8, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        if keep < 1 or select_dim < 1:
            raise ValueError(f"keep and select_dim are at least 1; got {keep} and {select_dim}")
        self.keep = keep
        self.select_q = nn.Linear(dim, heads * select_dim, bias=False)
        self.select_k = nn.Linear(dim, self.kv_heads * select_dim, bias=False)

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        if context is None:
            return self.to_out(join_heads(self.attend_chosen(x, x)))
        if padding is None:
            return self.to_out(join_heads(self.attend_chosen(x, context)))
        rows = zip(x.split(1), context.split(1), padding, strict=True)
        return torch.cat([self.mix(own, source[:, real], None, None) for own, source, real in rows])

    def attend_chosen(self, x: Tensor, source: Tensor) -> Tensor:
        q, k, v = self.project(x, source)
        return self.attend_gathered(q, k, v, *self.selectors(x, source))

    def attend_gathered(self, q: Tensor, k: Tensor, v: Tensor, narrow_q: Tensor, narrow_k: Tensor) -> Tensor:
        """Softmax of each query over the keys that it chose, which are gathered for it: (B, H, N, D)."""
        if not k.shape[2] or not q.shape[2]:
            return q.new_zeros(*q.shape[:3], v.shape[3])
        count = min(self.keep, k.shape[2])
        work = q.shape[0] * q.shape[1] * max(k.shape[2], count * q.shape[3])
        outs = []
        for rows in slices(q.shape[2], work):
            index, seen = self.chosen(narrow_q[:, :, rows], narrow_k, rows.start + k.shape[2] - q.shape[2])
            keys, values = (gathered_for(x, index) for x in (k, v))
            logits = (to_accum(q[:, :, rows]).unsqueeze(3) @ to_accum(keys).mT).squeeze(3) * q.shape[3] ** -0.5
            weights = logits.masked_fill(~seen, NEVER).softmax(-1)
            outs.append((weights.unsqueeze(3) @ to_accum(values)).squeeze(3).to(q.dtype))
        return torch.cat(outs, 2)

    def selectors(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """Narrow queries (B, H, N, d') and keys (B, G, M, d')."""
        return split_heads(self.select_q(x), self.heads), split_heads(self.select_k(source), self.kv_heads)

    @torch.no_grad()
    def chosen(self, q: Tensor, k: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The keys (B, H, n, keep) of the best narrow scores of queries from position ``first`` on; which are seen."""
        scores = score(q, to_accum(k))
        if self.causal:
            place = torch.arange(first, first + q.shape[2], device=q.device).unsqueeze(1)
            scores.masked_fill_(torch.arange(k.shape[2], device=q.device) > place, NEVER)
        best = scores.topk(min(self.keep, k.shape[2]), dim=-1, sorted=False)
        return best.indices, best.values > NEVER

    def selection_loss(self, x: Tensor, *, context: Tensor | None = None) -> Tensor:
        """How far the selector's softmax is from full attention's weights; gradients reach the selector alone.

        Mean over queries of Σ_j p_ij log(p_ij / p'_ij), in memory of all pairs, as training without selection takes.
        """
        self.check(x, context, None, None)
        source = x if context is None else context
        with torch.no_grad():
            q, k, _ = self.project(x, source)
            wanted = self.logits(q, k).softmax(-1)
        told = self.logits(*self.selectors(x.detach(), source.detach())).log_softmax(-1)
        apart = torch.xlogy(wanted, wanted) - torch.where(wanted > 0, wanted * told, 0.0)
        return apart.sum(-1).mean()

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        scores = score(to_accum(q), to_accum(k)) * q.shape[3] ** -0.5
        if not self.causal:
            return scores
        ahead = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(ahead, NEVER)

    # ---- decoding -------------------------------------------------------------------------------------------

    def empty_state(self, batch: int, capacity: int | None) -> KVCache:
        return KVCache(batch, capacity)

    def mix_after(self, x: Tensor, state: KVCache) -> StepOutput:  # type: ignore[override]
        q, k, v = self.project(x, x, state.seen)
        narrow_q, narrow_k = self.selectors(x, x)
        cache = state.append(torch.cat([k, narrow_k], 3), v)
        k, narrow_k = cache.k[..., : self.head_dim], cache.k[..., self.head_dim :]
        out = self.attend_gathered(q, k, cache.v, narrow_q, narrow_k)
        return StepOutput(self.to_out(join_heads(out)), cache)

    def state_bytes(self, n: int) -> int:
        narrow = self.select_k.out_features // self.kv_heads
        return n * self.kv_heads * (2 * self.head_dim + narrow) * self.weight.element_size()


def gathered_for(x: Tensor, index: Tensor) -> Tensor:
    """Keys ``index`` (B, H, n, K) of x (B, G, M, D), for each query its own: (B, H, n, K, D)."""
    by_group = index.unflatten(1, (x.shape[1], -1)).flatten(2)
    return take(x, by_group).unflatten(2, (-1, *index.shape[2:])).flatten(1, 2)
