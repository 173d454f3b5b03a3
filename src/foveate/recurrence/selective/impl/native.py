"""Scans and convolutions by native kernels: what they take, with gradients and without, compiled and not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate import autodiff
from foveate.dispatch import Facts, Implementation
from foveate.kernels.cpu.call import DTYPES, misaligned
from foveate.kernels.cpu.loader import library, num_threads, status
from foveate.plain import traced, transformed
from foveate.recurrence.selective.impl import conv_kernels, ops, scan_kernels
from foveate.recurrence.selective.impl.abi import num_marks
from foveate.recurrence.selective.impl.conv_kernels import Conv
from foveate.recurrence.selective.impl.scan_kernels import Scan
from foveate.recurrence.selective.inputs import Call, ConvInputs, LinearInputs, ScanInputs, state_facts


def refuse(call: Call) -> str | None:
    """Why this implementation cannot run the call; None if it can."""
    inputs = call.inputs
    if inputs.x.device.type != "cpu":
        return f"it runs on CPU, not on {inputs.x.device.type}"
    for name, x in inputs.tensors().items():
        if x.dtype not in DTYPES:
            return f"it has float32, bfloat16 and float16, not {name}'s {str(x.dtype).removeprefix('torch.')}"
        if misaligned(x):
            return f"{name} is not aligned in memory to its numbers of {x.element_size()} bytes"
    if isinstance(inputs, ConvInputs) and inputs.weight.shape[1] > conv_kernels.WIDEST:
        return f"it takes up to {conv_kernels.WIDEST} taps, not {inputs.weight.shape[1]}"
    if transformed():
        return "transforms of torch.func and derivatives in forward mode are those of the other forms"
    return _absence()


@torch.compiler.assume_constant_result  # torch.compile need not look into how libraries are loaded
def _absence() -> str | None:
    return status().reason if library() is None else None


class Planned(NamedTuple):
    """A call, and who looks on: autograd, whatever records or transforms operators, or nobody."""

    call: Call
    differentiable: bool
    dispatched: bool


def plan(call: Call) -> Planned:
    """Whether states are kept for a backward pass, and whether the call goes through torch's dispatcher."""
    tensors = (call.state, *call.inputs.tensors().values())
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return Planned(call, differentiable, traced(*tensors))


def run(planned: Planned) -> tuple[Tensor, Tensor]:
    """Return out and the state after the last token, or one for each packed sequence."""
    (inputs, state, lengths), differentiable, dispatched = planned
    if isinstance(inputs, ConvInputs):
        *tensors, silu, _ = arguments = inputs.x, inputs.weight, inputs.bias, state, inputs.silu, lengths
        if dispatched:
            return ops.conv(*arguments)
        if not differentiable:
            return conv_kernels.forward(*arguments)
        out, last = autodiff.run(Conv(silu, lengths), *tensors)
        return out, last
    assert isinstance(inputs, ScanInputs | LinearInputs)
    fields = scan_kernels.call_of(inputs, state, lengths)
    if dispatched:
        return ops.scan(*fields, differentiable)[:2]
    if differentiable:
        out, last = autodiff.run(Scan(fields.softplus, lengths), *fields[:9])
        return out, last
    return scan_kernels.forward(fields, keep=False)[:2]


def _facts(planned: Planned) -> Facts:
    inputs, state, _ = planned.call
    kept = num_marks(inputs.x, state) if planned.differentiable and not isinstance(inputs, ConvInputs) else 0
    return {"kept_states": kept, "threads": num_threads(), **state_facts(planned.call)}


NATIVE = Implementation("native", refuse, plan, run, facts=_facts)
