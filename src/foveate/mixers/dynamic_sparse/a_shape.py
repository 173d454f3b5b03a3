"""The A-shape heads of MInference."""

from __future__ import annotations

from typing import Any, ClassVar

from foveate.catalogue.budget import Budget
from foveate.catalogue.registry import register
from foveate.mixers.attention import recent
from foveate.mixers.pattern_mixer import PatternMixer
from foveate.patterns import Pattern
from foveate.patterns import sinks as earliest


@register(
    "minference_a_shape",
    papers=("MInference",),
    formula="o_i = Σ_j softmax_j(q_i·k_j / √d) v_j over j < s or i - w < j ≤ i",
    supports={"causal", "padding", "packed", "decode", "gqa"},
)
class AShape(PatternMixer):
    """Attention to the first keys and a window of recent ones: the A-shape head of MInference."""

    tiny: ClassVar[dict[str, Any]] = {"sinks": 3, "window": 6}
    full_budget: ClassVar[dict[str, Any] | None] = {"window": 1 << 20}
    spends: ClassVar[Budget | str | None] = "window"

    @staticmethod
    def pattern(*, sinks: int = 128, window: int = 1024) -> Pattern:
        return earliest(sinks) | recent(window) if sinks else recent(window)
