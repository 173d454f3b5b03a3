"""PowerAttention: blocks of keys at distances that are powers of two."""

from __future__ import annotations

from typing import Any, ClassVar

from foveate.catalogue.budget import Budget
from foveate.catalogue.registry import register
from foveate.mixers.attention import recent
from foveate.mixers.pattern_mixer import PatternMixer
from foveate.patterns import Pattern, power_of_two
from foveate.patterns import sinks as earliest


@register(
    "power_attention",
    papers=("PowerAttention",),
    formula="o_i = Σ_j softmax_j(q_i·k_j / √d) v_j over i - w < j ≤ i, ⌊i/b⌋ - ⌊j/b⌋ ∈ {1, 2, 4, …}, j < s",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    notes="d layers of it reach every one of the last 2^d blocks.",
)
class PowerAttention(PatternMixer):
    """Attention to a window and to blocks at distances of 1, 2, 4, 8, ... blocks before the query."""

    tiny: ClassVar[dict[str, Any]] = {"window": 3, "block": 2, "sinks": 1}
    full_budget: ClassVar[dict[str, Any] | None] = {"window": 1 << 20}
    spends: ClassVar[Budget | str | None] = "window"

    @staticmethod
    def pattern(*, window: int = 256, block: int = 64, sinks: int = 4) -> Pattern:
        if window < block:
            raise ValueError(f"the window reaches back to the blocks: at least block={block} keys; got window={window}")
        near = recent(window) | power_of_two(block)
        return near | earliest(sinks) if sinks else near
