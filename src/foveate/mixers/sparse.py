"""Sparse attention over blocks: at fixed distances, or chosen by each query."""

from __future__ import annotations

from typing import Any, ClassVar

from foveate.mixers.attention import AttentionMixer
from foveate.mixers.core import PatternCore
from foveate.mixers.registry import register
from foveate.mixers.window import recent
from foveate.patterns import power_of_two
from foveate.patterns import sinks as earliest
from foveate.patterns.dynamic import topk_blocks

JUMPS = {"differences": "outputs jump where a small move changes which keys are chosen"}


def power_core(*, window: int = 256, block: int = 64, sinks: int = 4) -> PatternCore:
    """The last ``window`` keys, the first ``sinks``, and blocks of keys at distances of 1, 2, 4, ... blocks.

    >>> power_core(window=128, block=64).pattern
    window(127, 0) | power_of_two(64) | sinks(4)
    """
    near = recent(window) | power_of_two(block)
    return PatternCore(near | earliest(sinks) if sinks else near)


@register(
    "power_attention",
    papers=("PowerAttention",),
    formula="o_i = Σ_j softmax_j(q_i·k_j / √d) v_j over i - w < j ≤ i, ⌊i/b⌋ - ⌊j/b⌋ ∈ {1, 2, 4, …}, j < s",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    core=power_core,
    notes="d layers of it reach every one of the last 2^d blocks.",
)
class PowerAttention(AttentionMixer):
    """Attention to a window and to blocks at distances of 1, 2, 4, 8, ... blocks before the query."""

    tiny: ClassVar[dict[str, Any]] = {"window": 3, "block": 2, "sinks": 1}
    full_budget: ClassVar[dict[str, Any] | None] = {"window": 1 << 20}

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        window: int = 256,
        block: int = 64,
        sinks: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, core=power_core(window=window, block=block, sinks=sinks), **options)


def moba_core(*, block: int = 128, k: int = 8, causal: bool = True) -> PatternCore:
    """The query's own block and the ``k - 1`` earlier ones whose mean keys score best.

    >>> moba_core(block=64, k=4).pattern
    topk_blocks(64, k=4)
    """
    return PatternCore(topk_blocks(block, k, causal=causal))


@register(
    "moba",
    papers=("MoBA",),
    formula="o_i = Σ_{j ∈ B_i} softmax_j(q_i·k_j / √d) v_j, B_i: its own and the best blocks by q_i·mean(k)",
    supports={"causal", "noncausal", "padding", "packed", "decode", "gqa"},
    core=moba_core,
)
class MoBA(AttentionMixer):
    """Attention to the query's own block and to the few others whose mean key suits it best."""

    tiny: ClassVar[dict[str, Any]] = {"block": 5, "k": 2}
    full_budget: ClassVar[dict[str, Any] | None] = {"k": 1 << 20}
    exempt: ClassVar[dict[str, str]] = JUMPS

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        block: int = 128,
        k: int = 8,
        causal: bool = True,
        **options: Any,
    ) -> None:
        core = moba_core(block=block, k=k, causal=causal)
        super().__init__(dim, heads, core=core, causal=causal, **options)
        self.block, self.k = block, k

    def pairs(self, n: int) -> int:
        return self.heads * pairs_of_width(self.block * self.k, n, causal=self.causal)

    def flops(self, n: int) -> int:
        scoring = 2 * n * -(-n // self.block) * self.heads * self.head_dim
        return super().flops(n) + (scoring // 2 if self.causal else scoring)


def pairs_of_width(width: int, n: int, *, causal: bool = True) -> int:
    """Pairs where each of n queries sees ``width`` keys, or as many as there are.

    >>> pairs_of_width(2, 4)
    7
    """
    width = min(width, n)
    return n * width - (width * (width - 1) // 2 if causal else 0)
