"""Attention to the recent past: sliding windows, one for all heads or one for each."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.attention import Bias, Weights, alibi, alibi_slopes, attend_partial, merge
from foveate.attention.ranges import attend_ranges
from foveate.cache import KVCache
from foveate.catalogue.registry import register
from foveate.layers.rotary import rotate
from foveate.mixers.attention import AttentionMixer, recent
from foveate.mixers.base import StepOutput, join_heads
from foveate.mixers.core import PatternCore, joined
from foveate.patterns import Layout, Pattern, boolean_mask, causal, per_head
from foveate.patterns import sinks as earliest
from foveate.patterns.rules.choose import score
from foveate.precision import accum_dtype, to_accum


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
    supports={"causal", "padding", "packed", "decode", "gqa"},
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

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        sinks: int = 4,
        window: int = 1024,
        rotary: float | None = None,
        **options: Any,
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
        """As ``attend`` does it, the window without the sinks that lie apart."""
        first = 0 if cache.is_whole else sinks.shape[2]
        k, v = cache.k[:, :, first:], cache.v[:, :, first:]
        parts = [attend_partial(near, k, v, joined(recent(self.window), causal))]
        if sinks.shape[2]:
            place = torch.arange(cache.seen - near.shape[2], cache.seen, device=near.device).unsqueeze(1)
            apart = place - torch.arange(sinks.shape[2], device=near.device) >= self.window
            parts.append(attend_partial(far, sinks, cache.v[:, :, : sinks.shape[2]], boolean_mask(apart)))
        return merge(parts).out

    def state_bytes(self, n: int) -> int:
        sinks = 0 if self.in_cache is None else min(n, self.sinks)
        return super().state_bytes(n) + sinks * self.kv_heads * self.head_dim * self.weight.element_size()


@register(
    "swat",
    papers=("SWAT (LLM)",),
    formula="o_i = Σ_{i-w<j≤i} σ(q_i·k_j / √d - s_h (i - j)) v_j",
    supports={"causal", "padding", "packed", "decode", "gqa"},
)
class SWAT(AttentionMixer):
    """Sliding-window attention with sigmoid weights, half of the heads favouring old keys.

    The balanced ALiBi slopes s_h of the two halves are opposite; queries and keys carry rotary positions.
    """

    tiny: ClassVar[dict[str, Any]] = {"window": 6}

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        window: int = 1024,
        rotary: float | None = 10_000.0,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, core=PatternCore(recent(window)), rotary=rotary, **options)

    def weights(self, num_keys: int) -> Weights | str:
        return "sigmoid"

    def bias(self) -> Bias | None:
        return alibi(balanced_slopes(self.heads, accum_dtype(self.weight.dtype), self.weight.device))


def balanced_slopes(heads: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """ALiBi slopes, positive for the first half of the heads and their opposites for the rest.

    >>> balanced_slopes(4)
    tensor([ 0.0625,  0.0039, -0.0625, -0.0039])
    """
    slopes = alibi_slopes(-(-heads // 2), dtype=dtype, device=device)
    return torch.cat([slopes, -slopes])[:heads]


RATIOS = (0.25, 0.5, 1.0, 2.0)


def layer_windows(window: int, layers: int) -> list[int]:
    """The base window of each layer of a model, a quarter of ``window`` in the first to twice it in the last.

    >>> layer_windows(512, 8)
    [128, 128, 256, 256, 512, 512, 1024, 1024]
    """
    return [max(1, int(window * RATIOS[4 * layer // layers])) for layer in range(layers)]


def mswa_core(*, window: int = 1024, heads: int = 4) -> PatternCore:
    """Windows of a quarter, half, once and twice ``window`` in four groups of heads.

    >>> mswa_core(window=64).pattern
    per_head([window(15, 0), window(31, 0), window(63, 0), window(127, 0)])
    """
    return PatternCore(per_head([recent(size) for size in layer_windows(window, heads)]))


@register(
    "mswa",
    papers=("MSWA",),
    formula="o_i^h = Σ_{i-w_h<j≤i} softmax_j(q_i·k_j / √d) v_j, w_h ∈ {w/4, w/2, w, 2w}",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    core=mswa_core,
    notes="layer_windows gives each layer's base window; a decoder keeps what its longest window sees.",
)
class MSWA(AttentionMixer):
    """Sliding-window attention whose heads have windows of a quarter, half, once and twice a base size."""

    tiny: ClassVar[dict[str, Any]] = {"window": 8}
    full_budget: ClassVar[dict[str, Any] | None] = {"window": 1 << 20}

    def __init__(self, dim: int, heads: int = 8, *, window: int = 1024, **options: Any) -> None:
        groups = 4 if heads % 4 == 0 else heads
        super().__init__(dim, heads, core=mswa_core(window=window, heads=groups), **options)
