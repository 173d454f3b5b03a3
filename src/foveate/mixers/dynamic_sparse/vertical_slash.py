"""The vertical-slash heads of MInference."""

from __future__ import annotations

from typing import Any, ClassVar

from foveate.catalogue.budget import Budget
from foveate.catalogue.registry import register
from foveate.mixers.attention import AHEAD, JUMPS
from foveate.mixers.pattern_mixer import PatternMixer
from foveate.patterns import Pattern, vertical_slash


@register(
    "minference_vertical_slash",
    papers=("MInference",),
    formula="o_i = Σ_j softmax_j(q_i·k_j / √d) v_j over j ∈ V or i - j ∈ S, V and S from the last 64 queries",
    supports={"causal", "padding", "packed", "gqa"},
    notes="For prefill: " + AHEAD + ".",
)
class VerticalSlash(PatternMixer):
    """Attention to the keys and the distances that the last queries attend to most."""

    tiny: ClassVar[dict[str, Any]] = {"vertical": 4, "slash": 5, "last": 6, "first": 2, "near": 2}
    full_budget: ClassVar[dict[str, Any] | None] = {"vertical": 1 << 20}
    spends: ClassVar[Budget | str | None] = "vertical"
    exempt: ClassVar[dict[str, str]] = {"causality": AHEAD, **JUMPS}

    @staticmethod
    def pattern(*, vertical: int = 512, slash: int = 512, last: int = 64, first: int = 30, near: int = 30) -> Pattern:
        return vertical_slash(vertical, slash, last=last, first=first, near=near)
