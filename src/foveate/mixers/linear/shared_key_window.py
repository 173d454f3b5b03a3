"""Sliding windows whose heads share one key, the attention of Rodimus+."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from foveate.catalogue.registry import register
from foveate.mixers.attention import AttentionMixer, recent
from foveate.mixers.base import split_heads
from foveate.mixers.core import PatternCore


@register(
    "shared_key_window",
    papers=("Rodimus / Rodimus+",),
    formula="o_i^h = Σ_{i-w<j≤i} softmax_j(q_i^h k_j / √d) v_j^h: keys without a head, values with one",
    supports={"causal", "padding", "packed", "decode"},
    notes="SW-SKA, the attention of Rodimus+. Unlike multi-query attention it keeps a value for each head.",
)
class SharedKeyWindow(AttentionMixer):
    """Sliding-window attention in which all heads share one key and each has its own value."""

    tiny: ClassVar[dict[str, Any]] = {"window": 6}

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        window: int = 1024,
        head_dim: int | None = None,
        rotary: float | None = 10_000.0,
        causal: bool = True,
    ) -> None:
        core = PatternCore(recent(window))
        super().__init__(dim, heads, core=core, head_dim=head_dim, rotary=rotary, causal=causal)
        self.to_k = nn.Linear(dim, self.head_dim, bias=False)

    def heads_of(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, v = split_heads(self.to_q(x), self.heads), split_heads(self.to_v(context), self.heads)
        return q, self.to_k(context).unsqueeze(1), v

    def state_bytes(self, n: int) -> int:
        return super().state_bytes(n) * (1 + self.heads) // (2 * self.heads)
