"""Delta correction: sparse attention, set right by full attention on a few queries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor

from foveate.attention import attend
from foveate.attention.bias_part import part_of_bias
from foveate.attention.biases import placed, split_bias
from foveate.attention.ranges import attend_ranges
from foveate.cache import KVCache
from foveate.catalogue.budget import Budget
from foveate.catalogue.registry import register
from foveate.mixers.attention import AttentionMixer, RotaryOptions
from foveate.mixers.base import StepOutput, join_heads
from foveate.mixers.core import Core, CoreOptions, PatternCore, joined, one_by_one
from foveate.mixers.normalizer_sink.streaming_llm import streaming_core
from foveate.patterns import Pattern, Scene, Sequence, causal, full
from foveate.patterns.algebra import Index
from foveate.patterns.part import Parts


@dataclass(frozen=True, eq=False, repr=False)
class EveryQuery(Pattern):
    """All keys, for every ``stride``-th query from the first."""

    stride: int

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"every_query({self.stride})"

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return (q % self.stride == 0) & (k == k)


@dataclass(frozen=True)
class DeltaCore:
    """A sparse core whose outputs are moved by the error it makes at every ``stride``-th query.

    With ``tail`` the last queries are fully attended, as the authors' code does: as many as stride does not divide, and
    max(``tail``, ``stride``) more.

    >>> q = k = v = torch.randn(1, 2, 9, 4)
    >>> DeltaCore(stride=4)(q, k, v, within=causal).shape
    torch.Size([1, 2, 9, 4])
    """

    base: Core = field(default_factory=streaming_core)
    stride: int = 64
    tail: int = 0
    exempt: ClassVar[dict[str, str]] = {"decoding": "it is for prompts: a query alone is fully attended"}

    def __post_init__(self) -> None:
        if self.stride < 1 or self.tail < 0:
            raise ValueError(
                "stride is the distance of fully attended queries, at least 1, and tail a number of them; got "
                f"{self.stride} and {self.tail}"
            )

    @property
    def pattern(self) -> Pattern:
        """What it looks at, the tail aside, whose queries no pattern can number without the length of the text."""
        return full if self.stride == 1 else self.base.pattern | EveryQuery(self.stride)

    def corrected(self, length: int) -> int:
        """How many queries are corrected: those before the tail."""
        return max(length - length % self.stride - max(self.tail, self.stride), 0) if self.tail else length

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, within: Pattern = full, **options: Unpack[CoreOptions]
    ) -> Tensor:
        apart = one_by_one(self, q, k, v, within=within, **options)
        if apart is not None:
            return apart
        layout, scale = options.get("layout") or Sequence(), options.get("scale")
        scene = Scene(q.shape[2], k.shape[2], layout, q.detach(), k.detach(), scale)
        added, functions = split_bias(options.get("bias"))
        biases, parts = tuple(placed(one, scene.offset) for one in added), Parts.of(within, scene)
        weights, softcap = options.get("weights", "softmax"), options.get("softcap")

        def exact(at: slice) -> Tensor:
            """Full attention of some queries."""
            own, seen = part_of_bias(biases, functions, at.start, step=at.step), parts.part(at, slice(None))
            return attend(q[:, :, at], k, v, seen, bias=own, weights=weights, scale=scale, softcap=softcap)

        end = self.corrected(q.shape[2])
        tail = slice(end, q.shape[2], 1)
        if not end:
            return exact(tail)
        sparse = self.base(q, k, v, within=within, **options)[:, :, :end]
        delta = exact(slice(0, end, self.stride)) - sparse[:, :, :: self.stride]
        out = sparse + delta.repeat_interleave(self.stride, dim=2)[:, :, :end]
        return torch.cat([out, exact(tail)], dim=2) if end < q.shape[2] else out


def delta_core(*, sinks: int = 4, window: int = 1024, stride: int = 64) -> DeltaCore:
    """Delta correction of a sink-and-window core.

    >>> delta_core(window=256, stride=32).base.pattern
    sinks(4) | window(255, 0)
    """
    return DeltaCore(streaming_core(sinks=sinks, window=window), stride)


class DeltaState(NamedTuple):
    """Keys and values, and the error (B, H, 1, D) at the last fully attended query."""

    cache: KVCache
    delta: Tensor


@register(
    "delta_attention",
    papers=("Delta Attention",),
    formula="o_i = sparse_i + (full_j - sparse_j), j = γ ⌊i / γ⌋",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    core=delta_core,
)
class DeltaAttention(AttentionMixer):
    """Sparse attention plus the error it makes at every γ-th query, which full attention measures there.

    ``base`` is the sparse core to correct; None is ``sinks`` and a ``window``.
    """

    one_by_one: ClassVar[bool] = True
    tiny: ClassVar[dict[str, Any]] = {"sinks": 1, "window": 4, "stride": 5}
    full_budget: ClassVar[dict[str, Any] | None] = {"stride": 1}
    spends: ClassVar[Budget | str | None] = "window"

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        stride: int = 64,
        sinks: int = 4,
        window: int = 1024,
        base: Core | None = None,
        **options: Unpack[RotaryOptions],
    ) -> None:
        base = base or streaming_core(sinks=sinks, window=window)
        super().__init__(dim, heads, core=DeltaCore(base, stride), **options)
        self.base, self.stride = base, stride

    def empty_state(self, batch: int, capacity: int | None) -> DeltaState:  # type: ignore[override]
        nothing = self.weight.new_zeros(batch, self.heads, 1, self.head_dim)
        return DeltaState(KVCache(batch, capacity), nothing)

    def mix_after(self, x: Tensor, state: DeltaState) -> StepOutput:  # type: ignore[override]
        q, k, v = self.project(x, x, state.cache.seen)
        cache, first = state.cache.append(k, v), -state.cache.seen % self.stride
        sparse, errors = self.sparse(q, cache), state.delta
        if first < q.shape[2]:
            some = slice(first, None, self.stride)
            seen = full if q.shape[2] == 1 else Parts.of(causal, Scene(q.shape[2], cache.seen)).part(some, slice(None))
            exact = attend(q[:, :, some], cache.k, cache.v, seen)
            errors = torch.cat([errors, exact - sparse[:, :, some]], dim=2)
        latest = (torch.arange(q.shape[2], device=q.device) - first).div(self.stride, rounding_mode="floor") + 1
        out = sparse + (errors if q.shape[2] == errors.shape[2] == 1 else errors[:, :, latest])
        return StepOutput(self.to_out(join_heads(out)), DeltaState(cache, errors[:, :, -1:]))

    def sparse(self, q: Tensor, cache: KVCache) -> Tensor:
        """What the base sees."""
        base = self.base
        if (
            q.shape[2] == 1
            and isinstance(base, PatternCore)
            and not (base.pattern.is_dynamic or base.pattern.needs_axes)
        ):
            return attend_ranges(q, cache.k, cache.v, cache.last_under(joined(base.pattern, causal)))
        return base(q, cache.k, cache.v, within=causal)

    def state_bytes(self, n: int) -> int:
        return super().state_bytes(n) + self.heads * self.head_dim * self.weight.element_size()
