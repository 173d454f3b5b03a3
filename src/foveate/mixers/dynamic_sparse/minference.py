"""MInference: each head gets the sparse pattern that suits it, chosen once offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from foveate.catalogue.registry import register
from foveate.mixers.attention import JUMPS, recent
from foveate.mixers.pattern_mixer import PatternMixer
from foveate.patterns import Pattern, per_head, topk_blocks, vertical_slash
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

    tiny: ClassVar[dict[str, Any]] = {"vertical": 4, "slash": 5, "last": 6}
    full_budget: ClassVar[dict[str, Any] | None] = {"vertical": 1 << 20}
    exempt: ClassVar[dict[str, str]] = {"causality": AHEAD, **JUMPS}

    @staticmethod
    def pattern(*, vertical: int = 512, slash: int = 512, last: int = 64) -> Pattern:
        return vertical_slash(vertical, slash, last=last)


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


PATTERNS: dict[str, Pattern] = {
    "a_shape": AShape.pattern(),
    "vertical_slash": VerticalSlash.pattern(),
    "block_sparse": BlockSparse.pattern(),
}


@register(
    "minference",
    papers=("MInference",),
    formula="o_i^h = Σ_j softmax_j(q_i·k_j / √d) v_j over the pattern found offline for head h",
    supports={"causal", "padding", "packed", "gqa"},
    notes="For prefill: " + AHEAD + ".",
)
class MInference(PatternMixer):
    """Attention in which each head follows an A-shape, a vertical-slash or a block-sparse pattern.

    >>> MInference.as_core(assignment=["a_shape", "block_sparse"]).pattern
    per_head([sinks(128) | window(1023, 0), topk_blocks(64, k=16, per="block")])

    ``assignment`` is the pattern of each head, "a_shape", "vertical_slash" or "block_sparse", one name or a list, as
    ``search_heads`` finds it; ``patterns`` replaces what the names stand for, as in ``patterns_under(0.25, 8192)``.
    Raises ValueError for an unknown name.
    """

    tiny: ClassVar[dict[str, Any]] = {
        "assignment": ("a_shape", "vertical_slash", "block_sparse", "vertical_slash"),
        "patterns": {
            "a_shape": AShape.pattern(sinks=2, window=5),
            "vertical_slash": vertical_slash(3, 4, last=5),
            "block_sparse": topk_blocks(4, 2, per="block"),
        },
    }
    full_budget: ClassVar[dict[str, Any] | None] = {"patterns": {"vertical_slash": vertical_slash(1 << 20, 1)}}
    exempt: ClassVar[dict[str, str]] = {"causality": AHEAD, **JUMPS}

    @staticmethod
    def pattern(
        *, assignment: str | Sequence[str] = "vertical_slash", patterns: Mapping[str, Pattern] | None = None
    ) -> Pattern:
        known = {**PATTERNS, **(patterns or {})}
        names = [assignment] if isinstance(assignment, str) else list(assignment)
        for name in names:
            if name not in known:
                raise ValueError(f"a head is assigned one of {', '.join(known)}; got {name!r}")
        return per_head([known[name] for name in names])
