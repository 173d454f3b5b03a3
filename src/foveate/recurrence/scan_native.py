"""The scans by native CPU kernels, forward and backward."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.native.call import check, pointer
from foveate.native.loader import num_threads
from foveate.recurrence import scan_abi as c
from foveate.recurrence.scan_inputs import LinearInputs, ScanInputs


class Call(NamedTuple):
    """What the kernels compute from. A linear scan has its decays in the place of dt, and neither A nor B and C."""

    x: Tensor
    dt: Tensor
    A: Tensor | None
    B: Tensor | None
    C: Tensor | None
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    state: Tensor
    softplus: bool
    lengths: Sequence[int] | None

    def marks_shape(self, keep: bool) -> tuple[int, int, int]:
        """Of the states before every 64 tokens of every sequence, (places, states, channels)."""
        places = c.num_marks(self.x, self.state) if keep else 0
        return places, 1 if self.A is None else self.A.shape[1], self.x.shape[2]


def call_of(inputs: ScanInputs | LinearInputs, state: Tensor, lengths: Sequence[int] | None) -> Call:
    """The call that computes a scan of either kind."""
    if isinstance(inputs, LinearInputs):
        return Call(inputs.x, inputs.decay, None, None, None, None, None, None, state, False, lengths)
    given = inputs.x, inputs.dt, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z, inputs.dt_bias
    return Call(*given, state, inputs.softplus, lengths)


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Out, the last state, and marks for the backward pass (none unless ``keep``)."""
    out, last = call.x.new_empty(call.x.shape), call.state.new_empty(call.state.shape)
    marks = torch.zeros(call.marks_shape(keep))  # packed sequences leave some places unused
    argument, held = _argument(call)
    argument.out, argument.last, argument.marks = c.stream(out), last.data_ptr(), marks.data_ptr() if keep else None
    check(c.kernels().foveate_scan_forward(ctypes.byref(argument)))
    del held
    return out, last, marks


def backward(call: Call, marks: Tensor, grad_out: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and of the state."""
    if not marks.numel():
        marks = forward(call, keep=True)[2]
    argument, held = _argument(call)
    dx, ddt, dB, dC, dz = (
        None if t is None else t.new_empty(t.shape) for t in (call.x, call.dt, call.B, call.C, call.z)
    )
    parameters = call.A, call.D, call.dt_bias
    sums = [None if t is None else torch.empty(t.shape) for t in parameters]
    d_state, grad_last = torch.empty(call.state.shape), grad_last.contiguous()
    argument.marks, argument.grad_out, argument.grad_last = marks.data_ptr(), c.stream(grad_out), grad_last.data_ptr()
    argument.dx, argument.ddt, argument.dz = c.stream(dx), c.stream(ddt), c.stream(dz)
    argument.db, argument.dc = c.stream(dB), c.stream(dC)
    argument.d_rates, argument.d_skip, argument.d_bias = map(pointer, sums)
    argument.d_first = d_state.data_ptr()
    check(c.kernels().foveate_scan_backward(ctypes.byref(argument)))
    del held
    dA, dD, d_bias = map(c.like, sums, parameters)
    return dx, ddt, dA, dB, dC, dD, dz, d_bias, d_state


def _argument(call: Call) -> tuple[c.ScanArgument, list[Tensor | None]]:
    channels = call.x.shape[2]
    A = torch.ones(channels, 1) if call.A is None else call.A
    held = [*map(c.plain, (A, call.D, call.dt_bias, call.state)), c.starts_of(call.lengths)]
    rates, skip, bias, first, starts = map(pointer, held)
    streams = (c.stream(t) for t in (call.x, call.dt, call.z, call.B, call.C, None))
    groups = (1 if t is None else t.shape[2] for t in (call.B, call.C))
    sizes = (call.state.shape[0], call.x.shape[1], channels, A.shape[1], *groups, call.softplus, num_threads())
    return c.ScanArgument(*streams, rates, skip, bias, first, None, None, starts, *sizes), held


class Scan(torch.autograd.Function):
    """Takes the fields of a Call."""

    @staticmethod
    def forward(ctx: Any, *fields: Any) -> tuple[Tensor, Tensor]:
        call = Call(*fields)
        out, last, marks = forward(call, keep=True)
        ctx.rest = call.softplus, call.lengths
        ctx.save_for_backward(marks, *call[:9])
        return out, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_last: Tensor) -> tuple[Any, ...]:
        marks, *tensors = ctx.saved_tensors
        return *backward(Call(*tensors, *ctx.rest), marks, grad_out, grad_last), None, None
