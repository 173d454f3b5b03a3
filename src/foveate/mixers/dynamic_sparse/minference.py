"""MInference: each head gets the sparse pattern that suits it, chosen once offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from foveate.catalogue.registry import register
from foveate.mixers.attention import JUMPS, AttentionMixer, recent
from foveate.mixers.core import PatternCore
from foveate.patterns import Pattern, per_head, sinks
from foveate.patterns.rules.dynamic import topk_blocks, vertical_slash

AHEAD = "its choice for early queries looks at later ones"


def a_shape_core(*, sinks: int = 128, window: int = 1024) -> PatternCore:
    """The first ``sinks`` keys and the last ``window``.

    >>> a_shape_core(sinks=64, window=256).pattern
    sinks(64) | window(255, 0)
    """
    return PatternCore(_a_shape(sinks, window))


def vertical_slash_core(*, vertical: int = 512, slash: int = 512, last: int = 64) -> PatternCore:
    """The ``vertical`` keys and the ``slash`` distances that the ``last`` queries attend to most.

    >>> vertical_slash_core(vertical=100, slash=200).pattern
    vertical_slash(100, 200)
    """
    return PatternCore(vertical_slash(vertical, slash, last=last))


def block_sparse_core(*, block: int = 64, k: int = 16) -> PatternCore:
    """For each block of queries, the ``k`` blocks of keys whose mean key scores best with its mean query.

    >>> block_sparse_core(block=64, k=8).pattern
    topk_blocks(64, k=8, per="block")
    """
    return PatternCore(topk_blocks(block, k, per="block"))


def _a_shape(count: int, window: int) -> Pattern:
    return sinks(count) | recent(window) if count else recent(window)


@register(
    "minference_a_shape",
    papers=("MInference",),
    formula="o_i = Σ_j softmax_j(q_i·k_j / √d) v_j over j < s or i - w < j ≤ i",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    core=a_shape_core,
)
class AShape(AttentionMixer):
    """Attention to the first keys and a window of recent ones: the A-shape head of MInference."""

    tiny: ClassVar[dict[str, Any]] = {"sinks": 3, "window": 6}
    full_budget: ClassVar[dict[str, Any] | None] = {"window": 1 << 20}

    def __init__(self, dim: int, heads: int = 8, *, sinks: int = 128, window: int = 1024, **options: Any) -> None:
        super().__init__(dim, heads, core=a_shape_core(sinks=sinks, window=window), **options)


@register(
    "minference_vertical_slash",
    papers=("MInference",),
    formula="o_i = Σ_j softmax_j(q_i·k_j / √d) v_j over j ∈ V or i - j ∈ S, V and S from the last 64 queries",
    supports={"causal", "padding", "packed", "gqa"},
    core=vertical_slash_core,
    notes="For prefill: " + AHEAD + ".",
)
class VerticalSlash(AttentionMixer):
    """Attention to the keys and the distances that the last queries attend to most."""

    tiny: ClassVar[dict[str, Any]] = {"vertical": 4, "slash": 5, "last": 6}
    full_budget: ClassVar[dict[str, Any] | None] = {"vertical": 1 << 20}
    exempt: ClassVar[dict[str, str]] = {"causality": AHEAD, **JUMPS}

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        vertical: int = 512,
        slash: int = 512,
        last: int = 64,
        **options: Any,
    ) -> None:
        core = vertical_slash_core(vertical=vertical, slash=slash, last=last)
        super().__init__(dim, heads, core=core, **options)


@register(
    "minference_block_sparse",
    papers=("MInference",),
    formula="o_i = Σ_{j ∈ B_i} softmax_j(q_i·k_j / √d) v_j, B_i: top-k blocks by mean(q_block)·mean(k_block)",
    supports={"causal", "padding", "packed", "gqa"},
    core=block_sparse_core,
    notes="For prefill: " + AHEAD + ".",
)
class BlockSparse(AttentionMixer):
    """Attention of each block of queries to the blocks of keys that suit its mean query best."""

    tiny: ClassVar[dict[str, Any]] = {"block": 4, "k": 3}
    full_budget: ClassVar[dict[str, Any] | None] = {"k": 1 << 20}
    exempt: ClassVar[dict[str, str]] = {"causality": AHEAD, **JUMPS}

    def __init__(self, dim: int, heads: int = 8, *, block: int = 64, k: int = 16, **options: Any) -> None:
        super().__init__(dim, heads, core=block_sparse_core(block=block, k=k), **options)


PATTERNS: dict[str, Pattern] = {
    "a_shape": a_shape_core().pattern,
    "vertical_slash": vertical_slash_core().pattern,
    "block_sparse": block_sparse_core().pattern,
}


def minference_core(
    *,
    assignment: str | Sequence[str] = "vertical_slash",
    patterns: Mapping[str, Pattern] | None = None,
) -> PatternCore:
    """The pattern assigned to each head: "a_shape", "vertical_slash" or "block_sparse", one name or a list.

    Find an assignment with ``search_heads``; ``patterns`` replaces what the names stand for, as in
    ``patterns_under(0.25, 8192)``.

    >>> minference_core(assignment=["a_shape", "block_sparse"]).pattern
    per_head([sinks(128) | window(1023, 0), topk_blocks(64, k=16, per="block")])

    Raises ValueError for an unknown name.
    """
    patterns = {**PATTERNS, **(patterns or {})}
    names = [assignment] if isinstance(assignment, str) else list(assignment)
    for name in names:
        if name not in patterns:
            raise ValueError(f"a head is assigned one of {', '.join(patterns)}; got {name!r}")
    return PatternCore(per_head([patterns[name] for name in names]))


@register(
    "minference",
    papers=("MInference",),
    formula="o_i^h = Σ_j softmax_j(q_i·k_j / √d) v_j over the pattern found offline for head h",
    supports={"causal", "padding", "packed", "gqa"},
    core=minference_core,
    notes="For prefill: " + AHEAD + ".",
)
class MInference(AttentionMixer):
    """Attention in which each head follows an A-shape, a vertical-slash or a block-sparse pattern."""

    tiny: ClassVar[dict[str, Any]] = {
        "assignment": ("a_shape", "vertical_slash", "block_sparse", "vertical_slash"),
        "patterns": {
            "a_shape": _a_shape(2, 5),
            "vertical_slash": vertical_slash(3, 4, last=5),
            "block_sparse": topk_blocks(4, 2, per="block"),
        },
    }
    full_budget: ClassVar[dict[str, Any] | None] = {"patterns": {"vertical_slash": vertical_slash(1 << 20, 1)}}
    exempt: ClassVar[dict[str, str]] = {"causality": AHEAD, **JUMPS}

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        assignment: str | Sequence[str] = "vertical_slash",
        patterns: Mapping[str, Pattern] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, core=minference_core(assignment=assignment, patterns=patterns), **options)
