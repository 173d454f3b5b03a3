"""Partial results of attention over parts of the keys, and their exact union."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention over some of the keys: ``out`` (B, H, N, Dv) and ``lse`` (B, H, N), the log of the sum of weights.

    ``lse`` is None for weights without a row sum (sigmoid, ReLU); their partial results add up.
    """

    out: Tensor
    lse: Tensor | None


def merge(partials: Sequence[Partial]) -> Partial:
    """The exact attention over the union of disjoint sets of keys, from the partial result on each.

    Rabe and Staats, Self-attention Does Not Need O(n^2) Memory, arXiv 2112.05682.

    >>> from foveate import attend, attend_partial
    >>> q, k, v = torch.randn(3, 1, 2, 5, 8).unbind(0)
    >>> halves = [attend_partial(q, k[:, :, s], v[:, :, s]) for s in (slice(0, 2), slice(2, 5))]
    >>> torch.allclose(merge(halves).out, attend(q, k, v), atol=1e-5)
    True

    Raises ValueError for an empty list, or where normalised and unnormalised parts are mixed.
    """
    if not partials:
        raise ValueError("merge takes at least one Partial; got none")
    with_lse = [partial.lse for partial in partials if partial.lse is not None]
    if not with_lse:
        return Partial(sum_of([partial.out for partial in partials]), None)
    if len(with_lse) < len(partials):
        raise ValueError("merge cannot join softmax parts (with lse) and sigmoid or ReLU parts (without)")
    lse = torch.stack(with_lse)
    total = log_sum_exp(lse)
    weights = torch.exp(lse - torch.where(total.isinf(), 0.0, total))
    out = sum_of([w.unsqueeze(-1) * partial.out for w, partial in zip(weights, partials, strict=True)])
    return Partial(out.to(partials[0].out.dtype), total)


def log_sum_exp(lse: Tensor) -> Tensor:
    """Log-sum-exp over the first dim, with -inf (and zero gradients) where every part is -inf."""
    empty = lse.isinf().all(0)
    safe = torch.where(empty, torch.zeros_like(lse), lse)
    return torch.where(empty, float("-inf"), torch.logsumexp(safe, 0))


def with_sink(partial: Partial, sink: Tensor) -> Partial:
    """Add a logit per head (H,) to the row sum that carries no value: an attention sink."""
    assert partial.lse is not None
    sink, empty = sink.to(partial.lse.dtype).view(1, -1, 1), partial.lse.isneginf()
    seen = torch.where(empty, 0.0, partial.lse)
    apart = (
        seen - sink
    )  # not by logaddexp: of rows that see nothing, or far less than the sink, it has no second gradient
    lse = torch.where(empty, sink, seen - torch.nn.functional.logsigmoid(apart))
    share = torch.where(empty, 0.0, torch.sigmoid(apart)).to(partial.out.dtype)
    return Partial(partial.out * share.unsqueeze(-1), lse)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def sums_dtype(q: Tensor) -> torch.dtype:
    """Of log row sums between forward and backward: at logits of 10,000 float32 leaves their weights three digits."""
    return torch.float32 if q.device.type == "mps" else torch.float64  # where there is no other


def lse_dtype(q: Tensor) -> torch.dtype:
    """Of the log row sums that users see."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32
