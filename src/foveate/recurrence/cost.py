"""What recurrences and scans take, by the numbers of tokens and of their state; a multiply-add is two operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.counting import Cost
from foveate.precision import accum_dtype


def recur_cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    bonus: Tensor | None = None,
    **_: Any,
) -> Cost:
    """Of each token, in products of D x Dv: a write to each state, what it recalls, its fading, a read by each head."""
    (batch, heads, num_queries, dim), (num_keys, value_dim) = q.shape, v.shape[2:]
    writes = 2 + (decay is not None) + 2 * (beta is not None) + 4 * (low_rank is not None)
    states = _num_states(k, v, decay, beta, *(low_rank or ())) * num_keys * writes
    reads = 2 * heads * num_queries
    own = 2 * heads * num_queries * (dim + value_dim) if bonus is not None else 0
    return Cost(batch * ((states + reads) * dim * value_dim + own))


def scan_cost(x: Tensor, dt: Tensor, A: Tensor, *_: Any, **__: Any) -> Cost:
    """Of each token, channel and number of its state: exp(dt A), its fading, dt x B, and a read."""
    return Cost(7 * x.numel() * A.shape[1])


def linear_scan_cost(x: Tensor, *_: Any, **__: Any) -> Cost:
    """A multiply-add a token and channel."""
    return Cost(2 * x.numel())


def conv_cost(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Cost:
    """A multiply-add for each tap of each token and channel."""
    return Cost(2 * x.numel() * weight.shape[1])


def empty_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    lengths: Sequence[int] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Out and state of recur, without their numbers."""
    states = _num_states(k, v, decay, beta, *(low_rank or ()))
    shape = (_num_sequences(q, lengths), states, q.shape[3], v.shape[3])
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(shape, dtype=dtype)


def empty_scan(
    x: Tensor, dt: Tensor, A: Tensor, *_: Any, lengths: Sequence[int] | None = None, **__: Any
) -> tuple[Tensor, Tensor]:
    """Out and state of scan, without their numbers."""
    return _empty(x, (_num_sequences(x, lengths), *A.shape))


def empty_linear_scan(
    x: Tensor, decay: Tensor, *, lengths: Sequence[int] | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Out and state of linear_scan, without their numbers."""
    return _empty(x, (_num_sequences(x, lengths), x.shape[2]))


def empty_conv(
    x: Tensor, weight: Tensor, *_: Any, lengths: Sequence[int] | None = None, **__: Any
) -> tuple[Tensor, Tensor]:
    """Out and tail of causal_conv, without their numbers."""
    tail = x.new_empty(_num_sequences(x, lengths), x.shape[2], weight.shape[1] - 1)
    return x.new_empty(x.shape), tail


def _empty(x: Tensor, state: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(state, dtype=accum_dtype(x))


def _num_states(*shared: Tensor | None) -> int:
    """The least number of heads that all of (heads,) or (B, heads, ...) are shared by."""
    return math.lcm(*(x.shape[0 if x.dim() == 1 else 1] for x in shared if x is not None))


def _num_sequences(x: Tensor, lengths: Sequence[int] | None) -> int:
    return x.shape[0] if lengths is None else len(lengths)
