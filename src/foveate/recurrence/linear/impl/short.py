"""The short way for plain calls: no gradient, nothing packed, straight to a native kernel.

A decoding step computes for a few microseconds; checking and describing a general call takes seventy. Whatever is not
plain, or not right, gets None and goes the long way, which says what is wrong.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveate.kernels.cpu.call import DTYPES
from foveate.kernels.cpu.loader import num_threads
from foveate.kernels.cpu.short import addresses, entry, head_of
from foveate.recurrence.linear.impl.abi import RecurArgument
from foveate.recurrence.linear.impl.native import WIDEST

HEAD, REST = head_of(RecurArgument, before="grad_out")  # no gradients
GATES = ("decay", "beta", "a", "b")
ABSENT = (0,) * 7


def recur_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    scale: float | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Out and the last state of a plain call; None if it is none."""
    kernel, gates = entry("foveate_recur_forward"), (decay, beta, *(low_rank or (None, None)))
    if len(gates) != len(GATES) or kernel is None:
        return None
    at = addresses(q, k, v, *gates, state)
    if at is None or not q.dim() == k.dim() == v.dim() == 4:
        return None
    if state is not None and not (state.dtype is torch.float32 and state.is_contiguous()):
        return None
    batch, heads, length, dim = q.shape
    k_batch, k_heads, k_length, k_dim = k.shape
    v_batch, v_heads, v_length, value_dim = v.shape
    fits = batch == k_batch == v_batch and length == k_length == v_length and dim == k_dim and 0 < dim <= WIDEST
    if not (fits and heads and length and value_dim and k_heads and v_heads):
        return None
    described = [_gate(x, at[3 + i], GATES[i], batch, length, dim) for i, x in enumerate(gates)]
    fitting = [gate for gate in described if gate is not None]
    if len(fitting) < len(GATES) or (beta is not None and low_rank is not None):
        return None
    shared = [k_heads, v_heads, *(gate[2] for gate in fitting if gate is not ABSENT)]
    states = math.lcm(*shared)
    if 0 in shared or heads % states or (state is not None and state.shape != (batch, states, dim, value_dim)):
        return None
    channels = dim if decay is not None and decay.dim() == 4 else 1
    out = v.new_empty((batch, heads, length, value_dim))
    final = v.new_empty((batch, states, dim, value_dim), dtype=torch.float32)
    head = HEAD.pack(
        at[0], DTYPES[q.dtype], heads, *q.stride(),
        at[1], DTYPES[k.dtype], k_heads, *k.stride(),
        at[2], DTYPES[v.dtype], v_heads, *v.stride(),
        out.data_ptr(), DTYPES[v.dtype], heads, *out.stride(),
        *fitting[0], *fitting[1], *fitting[2], *fitting[3],
        0, batch, states, length, dim, value_dim, channels, 0, num_threads(),
        dim**-0.5 if scale is None else scale,
        at[7], final.data_ptr(), 0,
    )  # fmt: skip
    return (out, final) if kernel(head + REST) == 0 else None


def _gate(x: Tensor | None, at: int, name: str, batch: int, length: int, dim: int) -> tuple[int, ...] | None:
    """How a gate is described to the kernel: address, dtype, heads, strides; None if it does not fit."""
    if x is None:
        return ABSENT
    shape, stride = x.shape, x.stride()
    if name == "decay" and len(shape) == 1:
        return (at, DTYPES[x.dtype], shape[0], 0, stride[0], 0, 0)
    if len(shape) < 3 or shape[0] != batch or shape[2] != length:
        return None
    if name in ("decay", "beta") and len(shape) == 3:
        return (at, DTYPES[x.dtype], shape[1], *stride, 0)
    if name == "beta" or len(shape) != 4 or shape[3] != dim:
        return None
    return (at, DTYPES[x.dtype], shape[1], *stride)
