"""Exact attention in chunks, recomputed in the backward pass."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch import Tensor

from foveate.catalogue.registry import register
from foveate.mixers.attention import EVERYTHING, AttentionMixer, RotaryOptions
from foveate.mixers.exact_io.chunked import ChunkedCore
from foveate.patterns import Layout, Pattern


@register(
    "memory_efficient_attention",
    papers=("Memory-efficient attention (Rabe-Staats)",),
    formula="o_i = Σ_c e^{m_c - m} n_c / Σ_c e^{m_c - m} s_c, over chunks c of keys",
    supports=EVERYTHING,
    core=ChunkedCore,
)
class MemoryEfficientAttention(AttentionMixer):
    """Softmax attention over chunks of keys, summed up exactly as they come and recomputed in the backward pass.

    ``key_chunk`` is the authors' code's; None is √n, as in the paper's analysis. ``dropout`` drops weights in training:
    one seed a call, so that what is recomputed drops the same.
    """

    tiny: ClassVar[dict[str, Any]] = {"query_chunk": 31, "key_chunk": 23}
    full_budget: ClassVar[dict[str, Any] | None] = {}

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        query_chunk: int = 1024,
        key_chunk: int | None = 4096,
        dropout: float = 0.0,
        **options: Unpack[RotaryOptions],
    ) -> None:
        super().__init__(dim, heads, core=ChunkedCore(query_chunk, key_chunk), **options)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is a probability from 0 up to, but not, 1; got {dropout}")
        self.dropout = dropout

    def attend(self, q: Tensor, k: Tensor, v: Tensor, within: Pattern, layout: Layout | None) -> Tensor:
        assert isinstance(self.core, ChunkedCore)
        return self.core(q, k, v, within=within, layout=layout, dropout=self.dropout if self.training else 0.0)
