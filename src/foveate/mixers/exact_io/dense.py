"""Attention that looks everywhere: exact algorithms, and sigmoid weights."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from foveate.attention import Bias, alibi, alibi_slopes, attend
from foveate.cache import KVCache
from foveate.catalogue.registry import Feature, register
from foveate.mixers.attention import AttentionMixer, RotaryOptions
from foveate.mixers.base import join_heads
from foveate.mixers.core import PatternCore
from foveate.mixers.exact_io.chunked import ChunkedCore
from foveate.patterns import Layout, Packed, Pattern, causal, full
from foveate.precision import accum_dtype

EVERYTHING: set[Feature] = {"causal", "noncausal", "cross", "padding", "packed", "grid", "decode", "gqa"}


@register(
    "flash_attention",
    papers=("FlashAttention", "FlashAttention-2"),
    formula="o_i = Σ_j softmax_j(q_i·k_j / √d) v_j, over tiles of keys with a running maximum and sum",
    supports=EVERYTHING,
    core=PatternCore,
)
class FlashAttention(AttentionMixer):
    """Softmax attention over every key, computed tile by tile so that the table of weights is never stored.

    ``pattern`` is the paper's block-sparse extension: tiles in which it shows nothing are skipped. Forward and backward
    run over tiles on "native", "sdpa" and "tiles", with memory linear in the tokens ("reference" is the formula, and
    forms the table). Rows are divided by their sums once, at the end; backward recomputes weights from log row sums,
    which ``attend_partial`` returns; hidden tiles are skipped; queries are shared out among threads, a head's too: so
    in FlashAttention-2. On one thread of an AVX-512 processor "native" was measured at 58 to 70 % of the multiply-adds
    that the same thread reaches at best in float32 (``python -m benchmarks.row_claims flash_attention_2``).

    Dao, Fu, Ermon, Rudra, Ré, FlashAttention, arXiv 2205.14135; Dao, FlashAttention-2, arXiv 2307.08691.
    """

    full_budget: ClassVar[dict[str, Any] | None] = {}

    def __init__(self, dim: int, heads: int = 8, *, pattern: Pattern = full, **options: Unpack[RotaryOptions]) -> None:
        super().__init__(dim, heads, core=PatternCore(pattern), **options)


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

    tiny: ClassVar[dict[str, Any]] = {"query_chunk": 16, "key_chunk": 13}
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


@register(
    "sigmoid_attention",
    papers=("Sigmoid-Attention",),
    formula="o_i = Σ_j σ(q_i·k_j / √d - log n) v_j",
    supports={"causal", "noncausal", "padding", "packed", "decode", "gqa"},
)
class SigmoidAttention(AttentionMixer):
    """Attention whose weights are sigmoids of the logits, each on its own: rows are not normalised.

    ``length`` is the n of the bias -log n; None counts the keys that each query may see, so that decoding and
    training agree at every length. ``qk_norm`` normalises each head's queries and keys, which the paper
    recommends for stable training; ``alibi`` adds ALiBi's slopes times the distance, as in its language models.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        length: int | None = None,
        qk_norm: bool = False,
        alibi: bool = False,
        **options: Unpack[RotaryOptions],
    ) -> None:
        super().__init__(dim, heads, **options)
        if length is not None and length < 1:
            raise ValueError(f"length is the n of the bias -log n, at least 1; got {length}")
        self.length, self.alibi = length, alibi
        self.norm_q = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.norm_k = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()

    def heads_of(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads_of(x, context)
        return self.norm_q(q), self.norm_k(k), v

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        q, k, v = self.project(x, x)
        bias = self.biases(self.count_keys(x, layout, padding), q)
        out = attend(q, k, v, self.within(padding), bias=bias, weights="sigmoid", layout=layout)
        return self.to_out(join_heads(out))

    def attend_kept(self, q: Tensor, cache: KVCache) -> Tensor:
        counts = torch.arange(cache.seen - q.shape[2], cache.seen, device=q.device) + 1
        return attend(q, cache.k, cache.v, causal, bias=self.biases(counts.unsqueeze(0), q), weights="sigmoid")

    def biases(self, counts: Tensor, q: Tensor) -> list[Tensor | Bias]:
        log_bias = self.log_bias(counts).to(q.dtype)
        if not self.alibi:
            return [log_bias]
        return [log_bias, alibi(alibi_slopes(self.heads, dtype=accum_dtype(q.dtype), device=q.device))]

    def log_bias(self, counts: Tensor) -> Tensor:
        """-log n for each query, (B or 1, 1, N, 1)."""
        counts = counts if self.length is None else torch.full_like(counts, self.length)
        return -counts.clamp_min(1).double().log()[:, None, :, None]

    def count_keys(self, x: Tensor, layout: Layout | None, padding: Tensor | None) -> Tensor:
        """How many keys each query may see, (B or 1, N)."""
        key_mask = x.new_ones(1, x.shape[1], dtype=torch.long) if padding is None else padding.long()
        lengths = layout.lengths if isinstance(layout, Packed) else (x.shape[1],)
        parts = key_mask.split(list(lengths), dim=1)
        if self.causal:
            return torch.cat([part.cumsum(1) for part in parts], dim=1)
        return torch.cat([part.sum(1, keepdim=True).expand_as(part) for part in parts], dim=1)
