"""MoBA: each query chooses the blocks of keys that it sees."""

from __future__ import annotations

from typing import Any, ClassVar

from foveate.catalogue.registry import register
from foveate.mixers.attention import JUMPS, AttentionMixer
from foveate.mixers.core import PatternCore
from foveate.mixers.recurrent import wide
from foveate.patterns import topk_blocks


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

    def state_bytes(self, n: int) -> int:
        means = n // self.block * self.kv_heads * self.head_dim * wide(self.weight.dtype).itemsize
        return super().state_bytes(n) + means
