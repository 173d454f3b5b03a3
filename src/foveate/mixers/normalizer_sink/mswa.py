"""MSWA: sliding windows of several sizes, one for each group of heads."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from foveate.catalogue.budget import Budget
from foveate.catalogue.registry import register
from foveate.mixers.attention import AttentionMixer, RotaryOptions, recent
from foveate.mixers.core import PatternCore
from foveate.patterns import per_head

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
    core=mswa_core,
    notes="layer_windows gives each layer's base window; a decoder keeps a cache for each window.",
)
class MSWA(AttentionMixer):
    """Sliding-window attention whose heads have windows of a quarter, half, once and twice a base size."""

    tiny: ClassVar[dict[str, Any]] = {"window": 8}
    full_budget: ClassVar[dict[str, Any] | None] = {"window": 1 << 20}
    spends: ClassVar[Budget | str | None] = "window"

    def __init__(self, dim: int, heads: int = 8, *, window: int = 1024, **options: Unpack[RotaryOptions]) -> None:
        groups = 4 if heads % 4 == 0 else heads
        super().__init__(dim, heads, core=mswa_core(window=window, heads=groups), **options)
