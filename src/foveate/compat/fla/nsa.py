"""Native Sparse Attention: compressed blocks, blocks chosen by them, and a window."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.attention import attend
from foveate.compat.fla.forgetting import check_heads
from foveate.compat.fla.layout import Sequences
from foveate.mixers.dynamic_sparse.nsa_branches import Finished
from foveate.patterns import Pattern, causal, window
from foveate.patterns.rules.decided import block_table, pack_rows
from foveate.precision import to_accum

Offsets = Tensor | tuple[Tensor, Tensor]
ROWS = 1024  # queries scored at once


def parallel_nsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_cmp: Tensor | None = None,
    g_slc: Tensor | None = None,
    g_swa: Tensor | None = None,
    block_indices: Tensor | None = None,
    block_counts: Tensor | int = 16,
    block_size: int = 64,
    window_size: int = 0,
    scale: float | None = None,
    cu_seqlens: Offsets | None = None,
) -> Tensor:
    """NSA: g_cmp * attention to mean-pooled blocks + g_slc * to the best block_counts blocks + g_swa * to a window.

    >>> q, k, v = torch.randn(1, 40, 4, 8), torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2, 8)
    >>> g = torch.rand(3, 1, 40, 4)
    >>> parallel_nsa(q, k, v, *g, block_counts=3, block_size=8, window_size=8).shape
    torch.Size([1, 40, 4, 8])

    q is [B, TQ, HQ, K], the last TQ tokens of T, k [B, T, H, K], v [B, T, H, V], HQ a multiple of H (any, where theirs
    needs 16), gates [B, TQ, HQ]. A query scores the blocks that end at or before it by their mean keys; softmax
    weights, averaged over the heads of a group, choose. Its own block, the first one and the one before its own come
    first, in this order. block_indices [B, TQ, H, S], negative where there is none, override the choice, with a warning
    if g_cmp is there too; block_counts may be a tensor [B, TQ, H]. Without g_slc the chosen blocks have weight 1. A
    query for which no key is chosen gets zeros. cu_seqlens [N + 1], or a pair of them for queries and keys, are offsets
    of sequences packed in B = 1. No gradient flows through the choice.
    Raises ValueError where shapes do not fit, or where block_indices name a block twice.

    Yuan et al., Native Sparse Attention, arXiv 2502.11089.
    """
    gates = {"g_cmp": g_cmp, "g_slc": g_slc, "g_swa": g_swa}
    return _nsa(q, k, v, gates, block_indices, block_counts, block_size, window_size, scale, cu_seqlens)[0]


def naive_nsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_cmp: Tensor | None = None,
    g_slc: Tensor | None = None,
    g_swa: Tensor | None = None,
    block_indices: Tensor | None = None,
    block_counts: Tensor | int = 16,
    block_size: int = 64,
    window_size: int = 0,
    scale: float | None = None,
    cu_seqlens: Offsets | None = None,
    return_block_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`parallel_nsa`, which also returns the blocks chosen, [B, TQ, H, S], -1 where there is none.

    >>> q, k, v = torch.randn(1, 40, 4, 8), torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2, 8)
    >>> o, chosen = naive_nsa(q, k, v, torch.rand(1, 40, 4), block_counts=3, block_size=8, return_block_indices=True)
    >>> o.shape, chosen[0, 7:9, 0]
    (torch.Size([1, 40, 4, 8]), tensor([[ 0, -1, -1],
            [ 1,  0, -1]]))
    """
    gates = {"g_cmp": g_cmp, "g_slc": g_slc, "g_swa": g_swa}
    o, chosen = _nsa(q, k, v, gates, block_indices, block_counts, block_size, window_size, scale, cu_seqlens)
    return (o, chosen) if return_block_indices else o


def _nsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor | None],
    indices: Tensor | None,
    counts: Tensor | int,
    block: int,
    window_size: int,
    scale: float | None,
    cu_seqlens: Offsets | None,
) -> tuple[Tensor, Tensor]:
    """The mixed heads [B, TQ, HQ, V] and the chosen blocks [B, TQ, H, S]."""
    _check(q, k, v, gates, indices, counts, block, window_size)
    if gates["g_cmp"] is not None and indices is not None:
        warnings.warn("block_indices are given: they override the choice by g_cmp's branch", stacklevel=3)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    q_lengths, k_lengths = _lengths(q, k, cu_seqlens)
    per_query = [q, gates["g_cmp"], gates["g_slc"], gates["g_swa"], indices, counts]
    cut = [x.split(q_lengths, 1) if isinstance(x, Tensor) else [x] * len(q_lengths) for x in per_query]
    pieces = zip(k.split(k_lengths, 1), v.split(k_lengths, 1), *cut, strict=True)
    most = counts if isinstance(counts, int) else int(counts.max()) if counts.numel() else 0
    outs, chosen = zip(*(_one(most, block, window_size, scale, *piece) for piece in pieces), strict=True)
    return torch.cat(outs, 1), torch.cat(chosen, 1)


def _one(
    most: int,
    block: int,
    window_size: int,
    scale: float,
    k: Tensor,
    v: Tensor,
    q: Tensor,
    g_cmp: Tensor | None,
    g_slc: Tensor | None,
    g_swa: Tensor | None,
    indices: Tensor | None,
    counts: Tensor | int,
) -> tuple[Tensor, Tensor]:
    """One sequence a batch entry, its queries the last of its tokens."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    whole = k.shape[2] // block
    k_mean, v_mean = (
        to_accum(x[:, :, : whole * block]).unflatten(2, (whole, block)).mean(3).to(x.dtype) for x in (k, v)
    )
    if indices is None:
        indices = _choose(q, k_mean, most, block, scale, k.shape[2])
    if isinstance(counts, Tensor):
        indices = _within(indices, counts)
    out = _gated(attend(q, k, v, _chosen(indices, block, k.shape[2]), scale=scale), g_slc)
    if g_cmp is not None and whole:
        seen = Finished(block, block, lead=k.shape[2] - whole)
        out = out + _gated(attend(q, k_mean, v_mean, seen, scale=scale), g_cmp)
    if window_size:
        out = out + _gated(attend(q, k, v, window(window_size - 1) & causal, scale=scale), g_swa)
    return out.transpose(1, 2).to(q.dtype), indices


def _gated(heads: Tensor, gate: Tensor | None) -> Tensor:
    """Heads (B, HQ, N, V) times a gate [B, N, HQ]."""
    return to_accum(heads) if gate is None else to_accum(heads) * gate.transpose(1, 2).unsqueeze(-1)


@torch.no_grad()
def _choose(q: Tensor, k_mean: Tensor, most: int, block: int, scale: float, num_keys: int) -> Tensor:
    """The best blocks [B, N, H, S] of each query (B, HQ, N, D) by the means (B, H, C, D) of the whole blocks."""
    groups, num_queries = k_mean.shape[1], q.shape[2]
    parts = []
    for start in range(0, num_queries, ROWS):
        rows = to_accum(q[:, :, start : start + ROWS]).unflatten(1, (groups, -1))
        scores = rows @ to_accum(k_mean).unsqueeze(2).mT * scale  # (B, H, R, n, C)
        place = num_keys - num_queries + start + torch.arange(rows.shape[3], device=q.device).unsqueeze(1)
        parts.append(_best(scores, place, most, block, -(-num_keys // block)))
    indices = torch.cat(parts, 2) if parts else k_mean.new_zeros(q.shape[0], groups, 0, most, dtype=torch.long)
    return indices.transpose(1, 2)


def _best(scores: Tensor, place: Tensor, most: int, block: int, num_blocks: int) -> Tensor:
    """Indices (B, H, n, most) by scores (B, H, R, n, C) of queries at ``place`` (n, 1), best first."""
    number = torch.arange(num_blocks, device=scores.device)
    hidden = (number[: scores.shape[-1]] + 1) * block > place + 1
    weights = torch.where(hidden, 0, scores.masked_fill(hidden, -torch.inf).softmax(-1)).mean(2)
    weights = pad(weights, (0, num_blocks - weights.shape[-1]))
    own = place // block
    for rank, forced in ((2.0, number == own - 1), (3.0, number == 0), (4.0, number == own)):
        weights = weights.masked_fill(forced, rank)
    weights = weights.masked_fill(number > own, -1.0)
    best = weights.topk(min(most, num_blocks), dim=-1)
    indices = best.indices.masked_fill(best.values < 0, -1)
    return pad(indices, (0, most - indices.shape[-1]), value=-1)


def _within(indices: Tensor, counts: Tensor) -> Tensor:
    """As many of the indices [B, N, H, S] as counts [B, N, H] say, -1 for the others."""
    return indices.masked_fill(torch.arange(indices.shape[-1], device=indices.device) >= counts.unsqueeze(-1), -1)


def _chosen(indices: Tensor, block: int, num_keys: int) -> Pattern:
    """The keys up to the query in the blocks that indices [B, N, H, S] name."""
    num_queries, num_blocks = indices.shape[1], -(-num_keys // block)
    known = torch.where((indices < 0) | (indices >= num_blocks), num_blocks, indices).transpose(1, 2)
    times = torch.zeros(*known.shape[:3], num_blocks + 1, dtype=torch.long, device=known.device)
    times.scatter_add_(3, known, torch.ones_like(known))
    if bool((times[..., :-1] > 1).any()):
        raise ValueError("block_indices name a block twice for one query: softmax would count its keys twice")
    words = pack_rows(times[..., :-1] > 0, 1)
    return block_table(words, num_queries, q_block=1, k_block=block, q_start=num_keys - num_queries) & causal


def _lengths(q: Tensor, k: Tensor, cu_seqlens: Offsets | None) -> tuple[list[int], list[int]]:
    """Queries and keys of each sequence."""
    of_q, of_k = cu_seqlens if isinstance(cu_seqlens, tuple) else (cu_seqlens, cu_seqlens)
    q_lengths = Sequences(cu_seqlens=of_q).lengths(*q.shape[:2]) or [q.shape[1]]
    k_lengths = Sequences(cu_seqlens=of_k).lengths(*k.shape[:2]) or [k.shape[1]]
    if len(q_lengths) != len(k_lengths) or any(n > m for n, m in zip(q_lengths, k_lengths, strict=True)):
        raise ValueError(
            f"the queries are the last tokens of their sequences, so there are as many as keys or fewer, got "
            f"{q_lengths} queries of {k_lengths} tokens"
        )
    return q_lengths, k_lengths


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor | None],
    indices: Tensor | None,
    counts: Tensor | int,
    block: int,
    window_size: int,
) -> None:
    check_heads(q, k, v)
    per_group = (*q.shape[:2], k.shape[2])
    for name, gate in gates.items():
        if gate is not None and tuple(gate.shape) != tuple(q.shape[:3]):
            raise ValueError(f"{name} must be [B, TQ, HQ] = {tuple(q.shape[:3])}, got {tuple(gate.shape)}")
    if block < 1 or window_size < 0:
        raise ValueError(f"block_size is at least 1 and window_size 0, got {block} and {window_size}")
    if window_size and gates["g_swa"] is None:
        raise ValueError("window_size asks for the window's branch, which g_swa [B, TQ, HQ] weighs: pass g_swa")
    if indices is None and gates["g_cmp"] is None:
        raise ValueError("blocks are chosen beside the compressed branch: pass g_cmp, or block_indices [B, TQ, H, S]")
    if indices is not None and (indices.is_floating_point() or tuple(indices.shape[:-1]) != per_group):
        raise ValueError(
            f"block_indices must be whole numbers [B, TQ, H, S] beside {per_group}, got {indices.dtype} "
            f"{tuple(indices.shape)}"
        )
    if isinstance(counts, Tensor):
        if counts.is_floating_point() or tuple(counts.shape) != per_group:
            raise ValueError(
                f"block_counts must be whole numbers [B, TQ, H] = {per_group}, got {counts.dtype} {tuple(counts.shape)}"
            )
    elif counts < 0:
        raise ValueError(f"block_counts is at least 0, got {counts}")
