"""The short causal convolution by native CPU kernels, forward and backward."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.kernels.cpu.call import check, kernels, pointer, stream
from foveate.kernels.cpu.loader import num_threads
from foveate.recurrence.selective.chunked import definition
from foveate.recurrence.selective.impl import abi as c
from foveate.recurrence.selective.inputs import ConvInputs, Lengths

WIDEST = 64


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, silu: bool, lengths: Lengths
) -> tuple[Tensor, Tensor]:
    """Out and the last tail, both in x's dtype."""
    argument, held = _argument(x, weight, bias, tail, silu, lengths)
    out, last = x.new_empty(x.shape), c.buffer(x, *tail.shape)
    argument.out, argument.last = stream(out, *x.shape), pointer(last, torch.float32, *tail.shape)
    check(kernels("conv", c.ConvArgument).foveate_conv_forward(ctypes.byref(argument)))
    del held
    return out, last.to(x.dtype)


def backward(
    grad_out: Tensor,
    grad_last: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor,
    silu: bool,
    lengths: Lengths,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of x, weight, bias and tail."""
    argument, held = _argument(x, weight, bias, tail, silu, lengths)
    last, dx = c.plain(grad_last), x.new_empty(x.shape)
    d_weight, d_tail = c.buffer(x, *weight.shape), c.buffer(x, *tail.shape)
    d_bias = None if bias is None else c.buffer(x, *bias.shape)
    argument.grad_out, argument.dx = stream(grad_out, *x.shape), stream(dx, *x.shape)
    argument.grad_last = pointer(last, torch.float32, *tail.shape)
    addresses = (None if t is None else pointer(t, torch.float32, *t.shape) for t in (d_weight, d_bias, d_tail))
    argument.d_weight, argument.d_bias, argument.d_first = addresses
    check(kernels("conv", c.ConvArgument).foveate_conv_backward(ctypes.byref(argument)))
    del held
    return dx, d_weight.to(weight.dtype), c.like(d_bias, bias), d_tail.to(tail.dtype)


def _argument(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, silu: bool, lengths: Lengths
) -> tuple[c.ConvArgument, list[Tensor | None]]:
    (batch, length, channels), width = x.shape, weight.shape[1]
    sequences = batch if lengths is None else len(lengths)
    held = [*map(c.plain, (weight, bias, tail)), c.starts_of(lengths)]
    shapes = (channels, width), (channels,), (sequences, channels, width - 1)
    taps, added, first = (pointer(t, torch.float32, *wanted) for t, wanted in zip(held, shapes, strict=False))
    starts = pointer(held[-1], torch.int64, sequences + 1)
    sizes = (sequences, length, channels, width, silu, num_threads())
    return c.ConvArgument(stream(x, *x.shape), stream(None), taps, added, first, None, starts, *sizes), held


class Conv(NamedTuple):
    """A call as autograd takes it; its inputs are x, weight, bias and tail."""

    silu: bool
    lengths: Lengths

    def forward(self, *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        x, weight, bias, tail = inputs
        return forward(x, weight, bias, tail, self.silu, self.lengths), ()

    def backward(self, saved: tuple[Tensor, ...], grads: tuple[Tensor, ...], *inputs: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, tail = inputs
        return backward(grads[0], grads[1], x, weight, bias, tail, self.silu, self.lengths)

    def definition(self, *inputs: Any) -> tuple[Tensor, ...]:
        """The same in torch's own operators."""
        x, weight, bias, tail = inputs
        return definition(ConvInputs(x, weight, bias, self.silu), tail, self.lengths)
