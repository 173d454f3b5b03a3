"""SWAT: a sliding window with sigmoid weights and balanced ALiBi slopes."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from foveate.attention import Bias, Weights, alibi
from foveate.catalogue.registry import register
from foveate.mixers.attention import AttentionMixer, AttentionOptions, recent
from foveate.mixers.core import PatternCore
from foveate.precision import accum_dtype


@register(
    "swat",
    papers=("SWAT (LLM)",),
    formula="o_i = Σ_{i-w<j≤i} σ(q_i·k_j / √d - s_h (i - j)) v_j",
)
class SWAT(AttentionMixer):
    """Sliding-window attention with sigmoid weights, half of the heads favouring old keys.

    The balanced ALiBi slopes s_h of the two halves are opposite, ±2^-k for the k-th head of a half, whatever their
    number; queries and keys carry rotary positions.
    """

    tiny: ClassVar[dict[str, Any]] = {"window": 6}

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        window: int = 1024,
        rotary: float | None = 10_000.0,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, heads, core=PatternCore(recent(window)), rotary=rotary, **options)

    def weights(self, num_keys: int) -> Weights | str:
        return "sigmoid"

    def bias(self) -> Bias | None:
        return alibi(balanced_slopes(self.heads, accum_dtype(self.weight.dtype), self.weight.device))


def balanced_slopes(heads: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """2^-k for the k-th head of the first half, and their opposites for the rest.

    These are the paper's. ALiBi's own, which the authors' later code takes for all heads, depend on how many
    heads there are.

    >>> balanced_slopes(5)
    tensor([ 0.5000,  0.2500,  0.1250, -0.5000, -0.2500])
    """
    slopes = torch.exp2(-torch.arange(1, -(-heads // 2) + 1, dtype=dtype, device=device))
    return torch.cat([slopes, -slopes])[:heads]
