"""The three patterns of MInference, of which each head of a model has one (``methods/minference.py``)."""

from __future__ import annotations

from typing import Any, ClassVar

from foveate.catalogue.registry import register
from foveate.mixers.attention import JUMPS, recent
from foveate.mixers.pattern_mixer import PatternMixer
from foveate.patterns import Pattern, topk_blocks, vertical_slash
from foveate.patterns import sinks as earliest

AHEAD = "its choice for early queries looks at later ones"


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

    @staticmethod
    def pattern(*, sinks: int = 128, window: int = 1024) -> Pattern:
        return earliest(sinks) | recent(window) if sinks else recent(window)


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
    exempt: ClassVar[dict[str, str]] = {"causality": AHEAD, **JUMPS}

    @staticmethod
    def pattern(*, vertical: int = 512, slash: int = 512, last: int = 64, first: int = 30, near: int = 30) -> Pattern:
        return vertical_slash(vertical, slash, last=last, first=first, near=near)


@register(
    "minference_block_sparse",
    papers=("MInference",),
    formula="o_i = Σ_{j ∈ B_i} softmax_j(q_i·k_j / √d) v_j, B_i: top-k blocks by mean(q_block)·mean(k_block)",
    supports={"causal", "padding", "packed", "gqa"},
    notes="For prefill: " + AHEAD + ".",
)
class BlockSparse(PatternMixer):
    """Attention of each block of queries to the blocks of keys that suit its mean query best."""

    tiny: ClassVar[dict[str, Any]] = {"block": 4, "k": 3}
    full_budget: ClassVar[dict[str, Any] | None] = {"k": 1 << 20}
    exempt: ClassVar[dict[str, str]] = {"causality": AHEAD, **JUMPS}

    @staticmethod
    def pattern(*, block: int = 64, k: int = 16) -> Pattern:
        return topk_blocks(block, k, per="block")
