"""Mixture of Block Attention over packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention import attend
from foveate.compat.fla.forgetting import check_heads
from foveate.compat.fla.layout import Sequences
from foveate.patterns import Pattern, causal, topk_blocks


def parallel_moba(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, chunk_size: int, topk: int
) -> Tensor:
    """MoBA: a query sees its own block up to itself and the topk - 1 earlier ones whose mean keys score best.

    >>> q, k, v = (torch.randn(1, 40, 4, 8) for _ in range(3))
    >>> parallel_moba(q, k, v, torch.tensor([0, 30, 40]), max_seqlen=30, chunk_size=8, topk=2).shape
    torch.Size([1, 40, 4, 8])

    q is [1, T, HQ, K], k [1, T, H, K], v [1, T, H, V], HQ a multiple of H, of any floating dtype; cu_seqlens [N + 1]
    are the offsets of the sequences, some perhaps empty, whose blocks of chunk_size tokens count from their starts.
    topk=1 is causal attention, there as here. max_seqlen changes no result. Differentiable; no gradient flows
    through the choice. Raises ValueError where shapes do not fit.

    Lu et al., MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv 2502.13189.
    """
    check_heads(q, k, v)
    if chunk_size < 1 or topk < 1:
        raise ValueError(f"chunk_size and topk must be at least 1, got {chunk_size} and {topk}")
    lengths = Sequences(cu_seqlens=cu_seqlens).lengths(*q.shape[:2]) or [q.shape[1]]
    pattern: Pattern = causal if topk == 1 else topk_blocks(chunk_size, topk)
    q_pieces, k_pieces, v_pieces = (x.transpose(1, 2).split(lengths, 2) for x in (q, k, v))
    pieces = zip(q_pieces, k_pieces, v_pieces, strict=True)
    outs = [attend(q, k, v, pattern) for q, k, v in pieces if q.shape[2]]
    if not outs:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    return torch.cat(outs, 2).transpose(1, 2)
