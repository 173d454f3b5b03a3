"""PowerAttention: blocks of keys at distances that are powers of two."""

from __future__ import annotations

from typing import Any, ClassVar

from foveate.catalogue.registry import register
from foveate.mixers.attention import AttentionMixer, recent
from foveate.mixers.core import PatternCore
from foveate.patterns import power_of_two
from foveate.patterns import sinks as earliest


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
