"""The recurrence's C structures (kernels/cpu/csrc/recur_abi.h), and how a call is described to its kernels."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from ctypes import Structure, c_double, c_int64, c_void_p
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.kernels.cpu.call import OUT_OF_RANGE, RowsArgument, check, kernels, pointer, rows
from foveate.kernels.cpu.loader import num_threads
from foveate.plain import remembered

_ROWS, _GATES = ("q", "k", "v", "out"), ("decay", "beta", "a", "b")
_SIZES = ("sequences", "states", "tokens", "dim", "value_dim", "decay_channels", "reads_before", "threads")
_GRADS = ("grad_out", "dq", "dk", "dv", "ddecay", "dbeta", "da", "db")


class RecurArgument(Structure):
    """A call of the recurrence's kernels."""

    _fields_ = (
        *((name, RowsArgument) for name in _ROWS + _GATES),
        ("starts", c_void_p),
        *((name, c_int64) for name in _SIZES),
        ("scale", c_double),
        *((name, c_void_p) for name in ("initial", "final", "checkpoints")),
        *((name, RowsArgument) for name in _GRADS),
        ("grad_final", c_void_p),
        ("dinitial", c_void_p),
    )


SEGMENT = 64  # tokens from one checkpoint to the next, as in csrc/recur.h


class Inputs(NamedTuple):
    """Heads and gates of a call, each (B, heads, N, channels); sizes of 1 are spread over the others'."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None  # (B or 1, heads, N or 1, D or 1)
    beta: Tensor | None
    a: Tensor | None
    b: Tensor | None


class OutOfRange(ValueError):
    """A decay above 0, or a beta outside of [0, 2]."""


def checked(status: int) -> None:
    """Raise what a kernel reports."""
    if status == OUT_OF_RANGE:
        raise OutOfRange("decay must be at most 0 and beta in [0, 2] for every token")
    check(status)


def forward(
    inputs: Inputs, state: Tensor, lengths: Sequence[int] | None, scale: float, reads_before: bool, keeps: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Out, the last state, and the states that a backward pass starts from (none of them unless it ``keeps``)."""
    q, v = inputs.q, inputs.v
    out, final = v.new_empty(*q.shape[:3], v.shape[3]), torch.empty_like(state, memory_format=torch.contiguous_format)
    checkpoints = state.new_empty(num_checkpoints(q, lengths) if keeps else 0, *state.shape[1:])
    call = _call(inputs, state, lengths, scale, reads_before)
    state = state.contiguous()
    call.out = rows(out, *q.shape[:3], v.shape[3])
    call.initial, call.final = (pointer(x, torch.float32, *_states(inputs, lengths)) for x in (state, final))
    call.checkpoints = pointer(checkpoints, torch.float32, *checkpoints.shape) if keeps else None
    checked(_kernels().foveate_recur_forward(ctypes.byref(call)))
    return out, final, checkpoints


def backward(
    grad_out: Tensor,
    grad_state: Tensor,
    inputs: Inputs,
    state: Tensor,
    checkpoints: Tensor,
    lengths: Sequence[int] | None,
    scale: float,
    reads_before: bool,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, decay, beta, a, b (empty where not given) and of the first state, in float32."""
    grads = gradients(inputs, state)
    call = _call(inputs, state, lengths, scale, reads_before)
    marked = num_checkpoints(inputs.q, lengths), *state.shape[1:]
    call.checkpoints = pointer(checkpoints, torch.float32, *marked)
    call.grad_out = rows(grad_out, *inputs.q.shape[:3], inputs.v.shape[3])
    for name, grad in zip(_GRADS[1:], grads[:-1], strict=True):
        if grad.dim() == 4:
            setattr(call, name, rows(grad, *grad.shape))
    grad_state = grad_state.contiguous()
    call.grad_final, call.dinitial = (pointer(x, torch.float32, *state.shape) for x in (grad_state, grads[-1]))
    checked(_kernels().foveate_recur_backward(ctypes.byref(call)))
    return grads


def gradients(inputs: Inputs, state: Tensor) -> tuple[Tensor, ...]:
    """Room for what ``backward`` returns: one gradient per query head, or per state."""
    (batch, _, length, dim), states = inputs.q.shape, state.shape[1]
    widths = (dim, inputs.v.shape[3], inputs.decay.shape[3] if inputs.decay is not None else 0, 1, dim, dim)
    per_state = (
        state.new_empty(0) if x is None else state.new_empty(batch, states, length, width)
        for x, width in zip(inputs[1:], widths, strict=True)
    )
    return state.new_empty(inputs.q.shape), *per_state, state.new_empty(state.shape)


def _states(inputs: Inputs, lengths: Sequence[int] | None) -> tuple[int, int, int, int]:
    """(sequences, states, D, Dv): query heads that share all their keys, values and gates share a state."""
    heads = math.lcm(*(x.shape[1] for x in inputs[1:] if x is not None))
    sequences = inputs.q.shape[0] if lengths is None else len(lengths)
    return sequences, heads, inputs.q.shape[3], inputs.v.shape[3]


def _call(
    inputs: Inputs, state: Tensor, lengths: Sequence[int] | None, scale: float, reads_before: bool
) -> RecurArgument:
    (batch, _, length, dim), value_dim = inputs.q.shape, inputs.v.shape[3]
    call = RecurArgument(scale=scale, reads_before=reads_before)
    widths = (dim, dim, value_dim, 1 if inputs.decay is None else inputs.decay.shape[3], 1, dim, dim)
    for name, x, width in zip(("q", "k", "v", *_GATES), inputs, widths, strict=True):
        if x is not None:
            setattr(call, name, rows(x, batch, x.shape[1], length, width))
    if lengths is not None:
        call.held = _starts(tuple(lengths))
        call.starts = pointer(call.held, torch.int64, len(lengths) + 1)
    call.sequences, call.states = state.shape[:2]
    call.tokens, call.dim, call.value_dim, call.threads = length, dim, value_dim, num_threads()
    call.decay_channels = widths[3]
    return call


@remembered(64)
def _starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int64, device="cpu")


def num_checkpoints(q: Tensor, lengths: Sequence[int] | None) -> int:
    """How many states a backward pass starts from."""
    segment = SEGMENT
    if lengths is None:
        return q.shape[0] * -(-q.shape[2] // segment)
    return q.shape[2] // segment + len(lengths) + 1


def _kernels() -> ctypes.CDLL:
    return kernels("recur", RecurArgument)
