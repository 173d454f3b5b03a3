"""Scans and convolutions by native kernels: what they take, with gradients and without, compiled and not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate import autodiff
from foveate.kernels.cpu.call import DTYPES, misaligned
from foveate.kernels.cpu.loader import library, status
from foveate.plain import traced, transformed
from foveate.recurrence.selective.impl import conv as conv_native
from foveate.recurrence.selective.impl import native as scan_native
from foveate.recurrence.selective.impl import ops as scan_ops
from foveate.recurrence.selective.impl.conv import Conv
from foveate.recurrence.selective.impl.native import Scan
from foveate.recurrence.selective.inputs import ConvInputs, Inputs, LinearInputs, ScanInputs


def refuse(inputs: Inputs) -> str | None:
    """Why this implementation cannot run the call; None if it can."""
    if inputs.x.device.type != "cpu":
        return f"it runs on CPU, not on {inputs.x.device.type}"
    for name, x in inputs.tensors().items():
        if x.dtype not in DTYPES:
            return f"it has float32, bfloat16 and float16, not {name}'s {str(x.dtype).removeprefix('torch.')}"
        if misaligned(x):
            return f"{name} is not aligned in memory to its numbers of {x.element_size()} bytes"
    if isinstance(inputs, ConvInputs) and inputs.weight.shape[1] > conv_native.WIDEST:
        return f"it takes up to {conv_native.WIDEST} taps, not {inputs.weight.shape[1]}"
    if transformed():
        return "transforms of torch.func and derivatives in forward mode are those of the other forms"
    return _absence()


@torch.compiler.assume_constant_result  # torch.compile need not look into how libraries are loaded
def _absence() -> str | None:
    return status().reason if library() is None else None


def run(inputs: Inputs, state: Tensor, lengths: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Return out and the state after the last token, or one for each packed sequence."""
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (state, *inputs.tensors().values()))
    dispatched = traced(state, *inputs.tensors().values())
    if isinstance(inputs, ConvInputs):
        *tensors, silu, _ = call = inputs.x, inputs.weight, inputs.bias, state, inputs.silu, lengths
        if dispatched:
            return scan_ops.conv(*call)
        if not differentiable:
            return conv_native.forward(*call)
        out, last = autodiff.run(Conv(silu, lengths), *tensors)
        return out, last
    assert isinstance(inputs, ScanInputs | LinearInputs)
    fields = scan_native.call_of(inputs, state, lengths)
    if dispatched:
        return scan_ops.scan(*fields, differentiable)[:2]
    if differentiable:
        out, last = autodiff.run(Scan(fields.softplus, lengths), *fields[:9])
        return out, last
    return scan_native.forward(fields, keep=False)[:2]
