"""The scans by native CPU kernels, forward and backward."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.kernels.cpu.call import check, kernels, pointer, stream
from foveate.kernels.cpu.loader import num_threads
from foveate.recurrence.selective.chunked import definition
from foveate.recurrence.selective.impl import abi as c
from foveate.recurrence.selective.inputs import LinearInputs, ScanInputs


class KernelCall(NamedTuple):
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


def call_of(inputs: ScanInputs | LinearInputs, state: Tensor, lengths: Sequence[int] | None) -> KernelCall:
    """The call that computes a scan of either kind."""
    if isinstance(inputs, LinearInputs):
        return KernelCall(inputs.x, inputs.decay, None, None, None, None, None, None, state, False, lengths)
    given = inputs.x, inputs.dt, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z, inputs.dt_bias
    return KernelCall(*given, state, inputs.softplus, lengths)


def forward(call: KernelCall, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Out, the last state, and marks for the backward pass (none unless ``keep``)."""
    out, last = call.x.new_empty(call.x.shape), c.buffer(call.x, *call.state.shape)
    marks = c.buffer(call.x, *call.marks_shape(keep)).zero_()  # packed sequences leave some places unused
    argument, held = _argument(call)
    argument.out, argument.last = stream(out, *call.x.shape), pointer(last, torch.float32, *last.shape)
    argument.marks = pointer(marks, torch.float32, *marks.shape) if keep else None
    check(kernels("scan", c.ScanArgument).foveate_scan_forward(ctypes.byref(argument)))
    del held
    return out, last.to(call.state.dtype), marks


def backward(call: KernelCall, marks: Tensor, grad_out: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and of the state."""
    if not marks.numel():
        marks = forward(call, keep=True)[2]
    argument, held = _argument(call)
    streams = call.x, call.dt, call.z, call.B, call.C
    grads = [None if t is None else t.new_empty(t.shape) for t in streams]
    parameters = call.A, call.D, call.dt_bias
    sums = [None if t is None else c.buffer(call.x, *t.shape) for t in parameters]
    d_state, grad_last = c.buffer(call.x, *call.state.shape), grad_last.contiguous()
    argument.marks = pointer(marks, torch.float32, *call.marks_shape(True))
    argument.grad_out = stream(grad_out, *call.x.shape)
    described = [stream(None) if t is None else stream(t, *t.shape) for t in grads]
    argument.dx, argument.ddt, argument.dz, argument.db, argument.dc = described
    addresses = (None if t is None else pointer(t, torch.float32, *t.shape) for t in (*sums, d_state))
    argument.d_rates, argument.d_skip, argument.d_bias, argument.d_first = addresses
    argument.grad_last = pointer(grad_last, torch.float32, *call.state.shape)
    check(kernels("scan", c.ScanArgument).foveate_scan_backward(ctypes.byref(argument)))
    del held
    (dx, ddt, dz, dB, dC), (dA, dD, d_bias) = grads, map(c.like, sums, parameters)
    return dx, ddt, dA, dB, dC, dD, dz, d_bias, d_state


def _argument(call: KernelCall) -> tuple[c.ScanArgument, list[Tensor | None]]:
    batch, length, channels = shape = call.x.shape
    A = call.x.new_ones(channels, 1) if call.A is None else call.A
    sequences, states = batch if call.lengths is None else len(call.lengths), A.shape[1]
    parameters = [*map(c.plain, (A, call.D, call.dt_bias, call.state)), c.starts_of(call.lengths)]
    state_shape = (sequences, channels) if call.A is None else (sequences, channels, states)
    shapes = (channels, states), (channels,), (channels,), state_shape
    rates, skip, bias, first = (
        pointer(x, torch.float32, *wanted) for x, wanted in zip(parameters, shapes, strict=False)
    )
    starts = pointer(parameters[-1], torch.int64, sequences + 1)
    groups = [1 if t is None else t.shape[2] for t in (call.B, call.C)]
    streams = [stream(t, *shape) for t in (call.x, call.dt, call.z)]
    pairs = zip((call.B, call.C), groups, strict=True)
    streams += [stream(t, batch, length, count, states) for t, count in pairs]
    sizes = (sequences, length, channels, states, *groups, call.softplus, num_threads())
    return c.ScanArgument(*streams, stream(None), rates, skip, bias, first, None, None, starts, *sizes), parameters


class Scan(NamedTuple):
    """A call as autograd takes it; its inputs are the tensors of a KernelCall."""

    softplus: bool
    lengths: Sequence[int] | None

    def forward(self, *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        out, last, marks = forward(KernelCall._make((*inputs, self.softplus, self.lengths)), keep=True)
        return (out, last), (marks,)

    def backward(self, saved: tuple[Tensor, ...], grads: tuple[Tensor, ...], *inputs: Any) -> tuple[Tensor | None, ...]:
        return backward(KernelCall._make((*inputs, self.softplus, self.lengths)), *saved, *grads)

    def definition(self, *inputs: Any) -> tuple[Tensor, ...]:
        """The same in torch's own operators."""
        x, dt, A, B, C, D, z, dt_bias, state = inputs
        if A is None or B is None or C is None:
            return definition(LinearInputs(x, dt), state, self.lengths)
        return definition(ScanInputs(x, dt, A, B, C, D, z, dt_bias, self.softplus), state, self.lengths)
