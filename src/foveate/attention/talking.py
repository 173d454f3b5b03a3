"""Talking-heads attention: logits are mixed over heads before the softmax, weights after it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from foveate.attention.call import Call, check_tensors, prepare
from foveate.attention.impl.definition import grouped
from foveate.attention.impl.reference import pattern_mask
from foveate.layouts.kinds import Layout
from foveate.patterns.algebra import Pattern
from foveate.patterns.rules.sequence import full
from foveate.precision import accum_dtype


def attend_talking(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = full,
    *,
    before: Tensor | None = None,
    after: Tensor | None = None,
    scale: float | Tensor | None = None,
    layout: Layout | None = None,
    chunk: int = 256,
) -> Tensor:
    """Talking-heads attention: softmax over logits mixed by ``before``, whose weights are mixed by ``after``.

    Every head's logits take part in every head's weights, so no pair is computed for one head alone: it runs by its
    definition, ``chunk`` queries at a time, recomputed in the backward pass. Memory beyond the inputs and the mask
    (heads of the pattern, N, M) grows with ``chunk * M``, work with N M (H D + H H2 + H2 Hv + Hv Dv).

    Shazeer, Lan, Cheng, Ding, Hou, Talking-Heads Attention, arXiv 2003.02436.

    >>> import torch
    >>> from foveate import attend_talking, causal
    >>> q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 3, 9, 5)
    >>> attend_talking(q, k, v, causal, before=torch.randn(4, 6), after=torch.randn(6, 3)).shape
    torch.Size([2, 3, 9, 5])

    Args:
        q, k: (B, H, N, D), (B, G, M, D), G dividing H; query i sits at key position ``i + M - N``.
        v: (B, Gv, M, Dv), Gv dividing the number of heads out.
        pattern: which pairs are visible, to all H2 heads or to each its own; a row that sees no key gives zeros.
        before: (H, H2): entry [h, s] is what head h's logits count in softmax s; None keeps the H heads apart.
        after: (H2, Hv): entry [s, o] is what the weights of softmax s count in head o; None keeps them apart.
        scale: factor on q k^T as in :func:`attend`; D ** -0.5 by default.
        layout: where tokens live, as in :func:`attend`.
        chunk: queries whose weights are formed at once.

    Returns:
        (B, Hv, N, Dv) in the dtype of q; differentiable by all tensors.

    Raises ValueError, TypeError for inputs that do not belong together, in words.
    """
    if chunk < 1:
        raise ValueError(f"chunk is how many queries are worked on at once, at least 1; got {chunk}")
    check_tensors(q, k, v[:, :1])
    _check_mix("before", before, q, q.shape[1])
    softmaxes = q.shape[1] if before is None else before.shape[1]
    _check_mix("after", after, q, softmaxes)
    heads_out = softmaxes if after is None else after.shape[1]
    call, _ = prepare(q, k, v[:, :1], pattern, None, "softmax", scale, None, layout, needs_lse=False)
    if v.shape[1] == 0 or heads_out % v.shape[1]:
        raise ValueError(f"value heads must divide the {heads_out} heads out; got v {tuple(v.shape)}")
    mask = _mask(call, softmaxes)
    queries = call.q.split(chunk, dim=2) if call.num_queries else [call.q]
    masks = mask.split(chunk, dim=2) if call.num_queries else [mask]
    tensors = (call.k, v, before, after)
    rows = [_recomputed(some, seen, *tensors, call.scale) for some, seen in zip(queries, masks, strict=True)]
    return torch.cat(rows, dim=2)


def _check_mix(name: str, mix: Tensor | None, q: Tensor, heads: int) -> None:
    if mix is None:
        return
    if not isinstance(mix, Tensor) or not mix.is_floating_point() or mix.device != q.device:
        what = f"{mix.dtype} on {mix.device}" if isinstance(mix, Tensor) else type(mix).__name__
        raise TypeError(f"{name} is a float tensor on {q.device}; got {what}")
    if mix.dim() != 2 or mix.shape[0] != heads or mix.shape[1] == 0:
        raise ValueError(f"{name} mixes {heads} heads into others, ({heads}, heads after it); got {tuple(mix.shape)}")


def _mask(call: Call, softmaxes: int) -> Tensor:
    """Which pairs are visible, (B or 1, 1 or H2, N, M)."""
    mask = pattern_mask(call)
    if softmaxes % mask.shape[1]:
        raise ValueError(
            f"{call.pattern} tells {mask.shape[1]} heads apart, which does not divide {softmaxes} softmaxes"
        )
    return mask if mask.shape[1] == 1 else mask.repeat_interleave(softmaxes // mask.shape[1], dim=1)


def _rows(
    q: Tensor, visible: Tensor, k: Tensor, v: Tensor, before: Tensor | None, after: Tensor | None, scale: float
) -> Tensor:
    """Heads out of some queries; visible is (B or 1, 1 or H2, n, M). What is not finite spoils rows that see it."""
    precise = accum_dtype(q)
    (odd_q, rows), (odd_k, keys), (odd_v, values) = (finite_tokens(x.to(precise)) for x in (q, k, v))
    logits = scale * (rows @ grouped(keys, q.shape[1]).mT)  # (B, H, n, M)
    if before is not None:
        logits = torch.einsum("bhnm,hs->bsnm", logits, before.to(precise))
    logits = logits.masked_fill(odd_q | (odd_k | odd_v).mT, float("nan"))
    some = visible.any(-1, keepdim=True)
    logits = torch.where(some, torch.where(visible, logits, float("-inf")), 0)
    weights = torch.where(visible, torch.softmax(logits, -1), 0)
    if after is not None:
        weights = torch.einsum("bsnm,so->bonm", weights, after.to(precise))
    return (weights @ grouped(values, weights.shape[1])).to(q.dtype)


def finite_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens are not finite in some head, (B, 1, length, 1), and zeros in place of these."""
    odd = ~x.isfinite().all(-1, keepdim=True).all(1, keepdim=True)
    return odd, x.masked_fill(odd, 0)


def _recomputed(*inputs: object) -> Tensor:
    if not torch.is_grad_enabled():
        return _rows(*inputs)  # type: ignore[arg-type]
    return checkpoint(_rows, *inputs, use_reentrant=False)
