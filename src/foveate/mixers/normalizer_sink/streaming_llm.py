"""StreamingLLM: a window of recent keys and the first few, at constant memory."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.attention import attend_partial, merge
from foveate.attention.ranges import attend_ranges
from foveate.cache import KVCache
from foveate.catalogue.budget import Budget
from foveate.catalogue.registry import register
from foveate.layers.rotary import rotate
from foveate.mixers.attention import AttentionMixer, AttentionOptions, recent
from foveate.mixers.base import StepOutput, join_heads
from foveate.mixers.core import PatternCore, joined
from foveate.patterns import Layout, Pattern, boolean_mask, causal
from foveate.patterns import sinks as earliest
from foveate.patterns.rules.choose import score
from foveate.precision import to_accum


def streaming_core(*, sinks: int = 4, window: int = 1024) -> PatternCore:
    """The first ``sinks`` keys and the last ``window``.

    >>> streaming_core(sinks=4, window=256).pattern
    sinks(4) | window(255, 0)
    """
    return PatternCore(earliest(sinks) | recent(window) if sinks else recent(window))


class StreamState(NamedTuple):
    """The keys kept, turned to their places in the text, their values, and the sinks' keys (B, G, s, D) as they are."""

    cache: KVCache
    sinks: Tensor


@register(
    "streaming_llm",
    papers=("StreamingLLM",),
    formula="o_i = Σ_j softmax_j(q_i·k_j / √d) v_j over j < s or i - w < j ≤ i",
    core=streaming_core,
)
class StreamingLLM(AttentionMixer):
    """Attention to the first few tokens and a window of recent ones, decoding at constant memory.

    ``rotary`` positions count inside the cache, as the paper has it: once tokens have been dropped, a sink
    stays as near to the query as the cache is long.
    """

    tiny: ClassVar[dict[str, Any]] = {"sinks": 2, "window": 6}
    one_by_one: ClassVar[bool] = True
    full_budget: ClassVar[dict[str, Any] | None] = {"window": 1 << 20}
    spends: ClassVar[Budget | str | None] = "window"

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        sinks: int = 4,
        window: int = 1024,
        rotary: float | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, heads, core=streaming_core(sinks=sinks, window=window), **options)
        self.sinks, self.window, self.in_cache = sinks, window, rotary

    def attend(self, q: Tensor, k: Tensor, v: Tensor, within: Pattern, layout: Layout | None) -> Tensor:
        if self.in_cache is None:
            return super().attend(q, k, v, within, layout)
        at = torch.arange(k.shape[2], device=k.device)
        k = rotate(k, at, self.in_cache)
        near = recent(self.window)
        parts = [attend_partial(rotate(q, at, self.in_cache), k, v, joined(near, within))]
        if self.sinks:
            q = rotate(q, at.clamp(max=self.sinks + self.window - 1), self.in_cache)
            parts.append(attend_partial(q, k, v, joined(earliest(self.sinks) & ~near, within)))
        return merge(parts).out

    # ---- decoding with positions counted in the cache: keys are kept turned to their place in the text ----------

    def empty_state(self, batch: int, capacity: int | None) -> KVCache | StreamState:  # type: ignore[override]
        cache = KVCache(batch, capacity, self.followed)
        if self.in_cache is None:
            return cache
        return StreamState(cache, self.weight.new_empty(batch, self.kv_heads, 0, self.head_dim))

    def mix_after(self, x: Tensor, state: KVCache | StreamState) -> StepOutput:  # type: ignore[override]
        if not isinstance(state, StreamState) or self.in_cache is None:
            assert isinstance(state, KVCache)
            return super().mix_after(x, state)
        q, k, v = self.project(x, x)
        at = torch.arange(state.cache.seen, state.cache.seen + x.shape[1], device=x.device)
        cache = state.cache.append(rotate(k, at, self.in_cache), v)
        sinks = torch.cat([state.sinks, k[:, :, : max(self.sinks - state.cache.seen, 0)]], dim=2)
        near, far = rotate(q, at, self.in_cache), rotate(q, at.clamp(max=self.sinks + self.window - 1), self.in_cache)
        attend_last = self.attend_last if x.shape[1] == 1 else self.attend_many
        out = self.to_out(join_heads(attend_last(near, far, cache, self.turned(sinks))))
        return StepOutput(out, StreamState(cache.trimmed(), sinks))

    def turned(self, sinks: Tensor) -> Tensor:
        assert self.in_cache is not None
        return rotate(sinks, torch.arange(sinks.shape[2], device=sinks.device), self.in_cache)

    def attend_last(self, near: Tensor, far: Tensor, cache: KVCache, sinks: Tensor) -> Tensor:
        """One query, turned for keys in the window and for sinks: these get the logits that they lack as a bias."""
        seen = cache.last_sees(near)
        assert seen is not None
        lacking = score(far, to_accum(sinks)) - score(near, to_accum(cache.k[:, :, : sinks.shape[2]]))
        bias = pad(lacking * self.head_dim**-0.5, (0, cache.k.shape[2] - sinks.shape[2]))
        return attend_ranges(near, cache.k, cache.v, seen, bias=bias)

    def attend_many(self, near: Tensor, far: Tensor, cache: KVCache, sinks: Tensor) -> Tensor:
        """As ``attend`` does it. Where keys were dropped, what is kept behind the sinks fills every query's window."""
        parts = [attend_partial(near, cache.k, cache.v, joined(recent(self.window), causal))]
        if sinks.shape[2]:
            place = torch.arange(cache.seen - near.shape[2], cache.seen, device=near.device).unsqueeze(1)
            apart = place - torch.arange(sinks.shape[2], device=near.device) >= self.window
            parts.append(attend_partial(far, sinks, cache.v[:, :, : sinks.shape[2]], boolean_mask(apart)))
        return merge(parts).out

    def state_bytes(self, n: int) -> int:
        sinks = 0 if self.in_cache is None else min(n, self.sinks)
        return super().state_bytes(n) + sinks * self.kv_heads * self.head_dim * self.weight.element_size()
