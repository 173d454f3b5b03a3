"""The native scans as operators of torch's dispatcher, so that torch.compile takes them whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate import autodiff
from foveate.recurrence.selective.impl import conv_kernels
from foveate.recurrence.selective.impl.scan_kernels import KernelCall, Scan, backward, forward


@torch.library.custom_op("foveate::scan", mutates_args=())
def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    softplus: bool,
    lengths: Sequence[int] | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return forward(KernelCall(x, dt, A, B, C, D, z, dt_bias, state, softplus, lengths), keep)


@scan.register_fake
def _(*fields: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, keep = KernelCall(*fields[:-1]), fields[-1]
    marks = call.x.new_empty(call.marks_shape(keep), dtype=torch.float32)
    return call.x.new_empty(call.x.shape), call.state.new_empty(call.state.shape), marks


@torch.library.custom_op("foveate::scan_backward", mutates_args=())
def _scan_backward(
    marks: Tensor,
    grad_out: Tensor,
    grad_last: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    softplus: bool,
    lengths: Sequence[int] | None,
) -> list[Tensor]:
    call = KernelCall(x, dt, A, B, C, D, z, dt_bias, state, softplus, lengths)
    return [grad for grad in backward(call, marks, grad_out, grad_last) if grad is not None]


@_scan_backward.register_fake
def _(marks: Tensor, grad_out: Tensor, grad_last: Tensor, *fields: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in fields if isinstance(x, Tensor)]


def _keep_scan_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, *tensors, softplus, lengths = inputs
    ctx.rest = softplus, lengths
    ctx.save_for_backward(*tensors)


def _second_scan(ctx: Any, wanted: list[Tensor | None]) -> tuple[Any, ...]:
    of_grads, of_inputs = _second(Scan(*ctx.rest), ctx.saved_tensors, wanted)
    return None, *of_grads, *of_inputs, None, None


_scan_backward.register_autograd(_second_scan, setup_context=_keep_scan_backward)


def _second(kernel: autodiff.Kernel, tensors: Sequence[Any], wanted: list[Tensor | None]) -> tuple[Any, Any]:
    """What autograd wants of a backward operator, whose first two tensors are gradients."""
    grads, inputs = tensors[:2], tensors[2:]
    arriving = iter(wanted)
    spread = [None if x is None else next(arriving) for x in inputs]
    create_graph = torch.is_grad_enabled()
    return autodiff.second_gradients(kernel.definition, inputs, grads, spread, create_graph=create_graph)


def _keep_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, softplus, lengths, _ = inputs
    ctx.rest = softplus, lengths
    ctx.save_for_backward(output[2], *tensors)


def _go_back_scan(ctx: Any, grad_out: Tensor, grad_last: Tensor, _: Tensor) -> tuple[Any, ...]:
    marks, *tensors = ctx.saved_tensors
    grads = iter(_scan_backward(marks, grad_out, grad_last, *tensors, *ctx.rest))
    return *(None if x is None else next(grads) for x in tensors), None, None, None


scan.register_autograd(_go_back_scan, setup_context=_keep_scan)


@torch.library.custom_op("foveate::causal_conv", mutates_args=())
def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, silu: bool, lengths: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    return conv_kernels.forward(x, weight, bias, tail, silu, lengths)


@conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(tail.shape)


@torch.library.custom_op("foveate::causal_conv_backward", mutates_args=())
def _conv_backward(
    grad_out: Tensor,
    grad_last: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor,
    silu: bool,
    lengths: Sequence[int] | None,
) -> list[Tensor]:
    grads = conv_kernels.backward(grad_out, grad_last, x, weight, bias, tail, silu, lengths)
    return [grad for grad in grads if grad is not None]


@_conv_backward.register_fake
def _(grad_out: Tensor, grad_last: Tensor, *arguments: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in arguments if isinstance(x, Tensor)]


def _keep_conv_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, silu, lengths = inputs
    ctx.rest = silu, lengths
    ctx.save_for_backward(*tensors)


def _second_conv(ctx: Any, wanted: list[Tensor | None]) -> tuple[Any, ...]:
    of_grads, of_inputs = _second(conv_kernels.Conv(*ctx.rest), ctx.saved_tensors, wanted)
    return *of_grads, *of_inputs, None, None


_conv_backward.register_autograd(_second_conv, setup_context=_keep_conv_backward)


def _keep_conv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, silu, lengths = inputs
    ctx.rest = silu, lengths
    ctx.save_for_backward(*tensors)


def _go_back_conv(ctx: Any, grad_out: Tensor, grad_last: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grads = iter(_conv_backward(grad_out, grad_last, *tensors, *ctx.rest))
    return *(None if x is None else next(grads) for x in tensors), None, None


conv.register_autograd(_go_back_conv, setup_context=_keep_conv)
