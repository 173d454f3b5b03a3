"""Dynamically composed heads: logits mixed over heads before the softmax, weights after it, anew for every pair."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from foveate.attention.call import check_tensors, prepare
from foveate.attention.impl.definition import grouped
from foveate.attention.impl.reference import pattern_mask
from foveate.attention.talking import finite_tokens
from foveate.layouts.kinds import Layout
from foveate.patterns.algebra import Pattern
from foveate.patterns.rules.sequence import full
from foveate.precision import accum_dtype


class Factors(NamedTuple):
    """One side's share of a composition, of each of its tokens: Σ_r read_r write_rᵀ + Diag(gate) on the heads.

    ``read`` and ``write`` are (B, N, R, H), ``gate`` (B, N, H).
    """

    read: Tensor
    write: Tensor
    gate: Tensor


class Composition(NamedTuple):
    """What heads become for a pair: themselves, plus ``base`` (H, H) if there is one, plus what query and key add."""

    query: Factors
    key: Factors
    base: Tensor | None = None


def attend_composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = full,
    *,
    before: Composition,
    after: Composition,
    scale: float | Tensor | None = None,
    layout: Layout | None = None,
    chunk: int = 256,
) -> Tensor:
    """Attention with dynamically composed heads, ``before`` the softmax and ``after`` it.

    Every head's logits take part in every head's weights, so it runs by its definition, ``chunk`` queries at a time,
    recomputed in the backward pass: memory beyond the inputs and the mask grows with ``chunk * M``.

    Xiao, Meng, Li, Yuan, Improving Transformers with Dynamically Composable Multi-Head Attention, arXiv 2405.08553.

    >>> import torch
    >>> from foveate.attention.composed import Composition, Factors, attend_composed
    >>> q, k, v = torch.randn(3, 2, 4, 9, 8).unbind(0)
    >>> some = Factors(*torch.randn(2, 2, 9, 2, 4).unbind(0), torch.randn(2, 9, 4))
    >>> attend_composed(q, k, v, before=Composition(some, some), after=Composition(some, some)).shape
    torch.Size([2, 4, 9, 8])

    Args: as of :func:`attend`; q (B, H, N, D), k and v (B, G, M, D), and ``chunk``, queries worked on at once.

    Returns (B, H, N, Dv) in the dtype of q; rows that see no key are zeros. ValueError, TypeError for inputs that do
    not belong together.
    """
    if chunk < 1:
        raise ValueError(f"chunk is how many queries are worked on at once, at least 1; got {chunk}")
    check_tensors(q, k, v)
    for name, composition in (("before", before), ("after", after)):
        _check(name, composition, q, k)
    call, _ = prepare(q, k, v, pattern, None, "softmax", scale, None, layout, needs_lse=False)
    mask = pattern_mask(call)
    if call.num_queries == 0 or call.num_keys == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3]) + 0 * (q.sum() + v.sum())
    rows = []
    for first in range(0, call.num_queries, chunk):
        part = slice(first, first + chunk)
        some, seen = call.q[:, :, part], mask[:, :, part]
        compositions = _of_queries(before, part), _of_queries(after, part)
        rows.append(_recomputed(some, seen, call.k, call.v, *compositions, call.scale))
    return torch.cat(rows, dim=2)


def _recomputed(*inputs: Any) -> Tensor:
    return checkpoint(_rows, *inputs, use_reentrant=False) if torch.is_grad_enabled() else _rows(*inputs)


def _check(name: str, composition: Composition, q: Tensor, k: Tensor) -> None:
    heads = q.shape[1]
    for side, tokens, factors in (("query", q.shape[2], composition.query), ("key", k.shape[2], composition.key)):
        rank = factors.read.shape[2] if factors.read.dim() == 4 else 1
        wanted = (q.shape[0], tokens, rank, heads), (q.shape[0], tokens, rank, heads), (q.shape[0], tokens, heads)
        got = tuple(tuple(x.shape) for x in factors)
        if got != wanted:
            raise ValueError(f"{name}.{side} has read, write and gate of shapes {wanted}; got {got}")
    if composition.base is not None and composition.base.shape != (heads, heads):
        raise ValueError(f"{name}.base is ({heads}, {heads}); got {tuple(composition.base.shape)}")


def _of_queries(composition: Composition, part: slice) -> Composition:
    return composition._replace(query=Factors(*(x[:, part] for x in composition.query)))


def _rows(
    q: Tensor, visible: Tensor, k: Tensor, v: Tensor, before: Composition, after: Composition, scale: float
) -> Tensor:
    """Heads out of some queries. What is not finite spoils the rows that see it."""
    precise = accum_dtype(q)
    (odd_q, rows), (odd_k, keys), (odd_v, values) = (finite_tokens(x.to(precise)) for x in (q, k, v))
    logits = _composed(scale * (rows @ grouped(keys, q.shape[1]).mT), before)
    logits = logits.masked_fill(odd_q | (odd_k | odd_v).mT, float("nan"))
    some = visible.any(-1, keepdim=True)
    logits = torch.where(some, torch.where(visible, logits, float("-inf")), 0)
    weights = torch.where(visible, torch.softmax(logits, -1), 0)
    return (_composed(weights, after) @ grouped(values, q.shape[1])).to(q.dtype)


def _composed(x: Tensor, composition: Composition) -> Tensor:
    """x (B, H, N, M), its heads composed for each pair."""
    out = x if composition.base is None else x + torch.einsum("bhnm,hi->binm", x, composition.base.to(x.dtype))
    for factors, token in ((composition.query, "n"), (composition.key, "m")):
        read, write, gate = (part.to(x.dtype) for part in factors)
        inner = torch.einsum(f"bhnm,b{token}rh->brnm", x, read)
        out = out + torch.einsum(f"brnm,b{token}rh->bhnm", inner, write)
        out = out + x * (gate.mT.unsqueeze(3 if token == "n" else 2))
    return out
