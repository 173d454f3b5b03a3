"""What the scans refuse, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from foveate.plain import is_plain
from foveate.recurrence.linear.checks import check_dense
from foveate.recurrence.selective.inputs import ConvInputs, Inputs, LinearInputs, ScanInputs


def check_scan(inputs: ScanInputs) -> None:
    """Shapes, dtypes and devices of a selective scan; and, on the CPU, the signs of A and of step sizes."""
    _check_kinds(inputs)
    _check_tokens(inputs, "x", "dt", "z")
    batch, length, channels = inputs.x.shape
    _check_shape("A", inputs.A, (channels, inputs.A.shape[-1] if inputs.A.dim() else 0), "(C, S)")
    for name in ("B", "C"):
        _check_vectors(name, getattr(inputs, name), batch, length, channels, inputs.A.shape[1])
    _check_per_channel(inputs, channels, "D", "dt_bias")
    _check_at_most_0("A", inputs.A, "the state would grow; with A_log at hand pass -A_log.exp()")
    if not inputs.softplus:
        _check_steps(inputs.dt, inputs.dt_bias)


def check_linear(inputs: LinearInputs) -> None:
    """Shapes, dtypes and devices of a linear scan; and, on the CPU, the sign of its decay."""
    _check_kinds(inputs)
    _check_tokens(inputs, "x", "decay")
    _check_at_most_0("decay", inputs.decay, "it is a logarithm; if you hold factors in [0, 1], pass decay.log()")


def check_conv(inputs: ConvInputs) -> None:
    """Shapes, dtypes and devices of a causal convolution."""
    _check_kinds(inputs)
    _check_tokens(inputs, "x")
    channels, weight = inputs.x.shape[2], inputs.weight
    if weight.dim() != 2 or weight.shape[0] != channels or not weight.shape[1]:
        raise ValueError(
            f"weight must be (C, width) with C = {channels} and a width of at least 1, got {tuple(weight.shape)}; "
            "of an nn.Conv1d's, (C, 1, width), pass weight.squeeze(1)"
        )
    _check_per_channel(inputs, channels, "bias")


def check_lengths(x: Tensor, lengths: Sequence[int]) -> None:
    """Lengths of packed sequences."""
    if x.shape[0] != 1:
        raise ValueError(f"packed sequences need batch size 1, got {x.shape[0]}; lay them out along the length")
    if len(lengths) == 0 or min(lengths) < 0:
        raise ValueError(f"lengths must name at least one sequence, none shorter than 0, got {list(lengths)}")
    if sum(lengths) != x.shape[1]:
        raise ValueError(f"lengths sum to {sum(lengths)}, but x has {x.shape[1]} tokens")


def check_state(state: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """A state carried over from an earlier call."""
    check_dense("state", state)
    if tuple(state.shape) != tuple(shape):
        axes = "(sequences, C, S)" if len(shape) == 3 else "(sequences, C)"
        raise ValueError(f"state must be {axes} = {tuple(shape)}, got {tuple(state.shape)}")
    if state.dtype != dtype:
        raise TypeError(f"state must be {dtype} for these inputs, got {state.dtype}; pass state.to({dtype})")
    _check_device("state", state, device)


def check_tail(tail: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """The last inputs of an earlier call."""
    check_dense("tail", tail)
    if tuple(tail.shape) != tuple(shape):
        raise ValueError(f"tail must be (sequences, C, width - 1) = {tuple(shape)}, got {tuple(tail.shape)}")
    if not tail.is_floating_point():
        raise TypeError(f"tail must have a floating dtype, got {tail.dtype}")
    _check_device("tail", tail, device)


def _check_kinds(inputs: Inputs) -> None:
    for field in fields(inputs):
        value = getattr(inputs, field.name)
        if not (value is None or isinstance(value, bool)):
            check_dense(field.name, value)
    given = inputs.tensors()
    for name, x in given.items():
        if not x.is_floating_point():
            raise TypeError(f"{name} must have a real floating dtype, got {x.dtype}")
        _check_device(name, x, given["x"].device)


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} but x on {device}; move them to one device")


def _check_tokens(inputs: Inputs, *names: str) -> None:
    given = inputs.tensors()
    x = given["x"]
    if x.dim() != 3 or not x.shape[2]:
        raise ValueError(f"x must be (batch, tokens, channels), at least one channel, got {tuple(x.shape)}")
    for name in names:
        if name in given and given[name].shape != x.shape:
            raise ValueError(f"{name} must have x's shape {tuple(x.shape)}, got {tuple(given[name].shape)}")


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...], axes: str) -> None:
    if tuple(x.shape) != shape or 0 in shape:
        raise ValueError(f"{name} must be {axes} with C = {shape[0]} and S at least 1, got {tuple(x.shape)}")


def _check_vectors(name: str, x: Tensor, batch: int, length: int, channels: int, states: int) -> None:
    if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (batch, length, states):
        shape = (*x.shape[:2], *x.shape[3:]) if x.dim() == 4 and x.shape[2] == 1 else tuple(x.shape)
        raise ValueError(
            f"{name} must be (B, N, S) or (B, N, groups, S) with B, N, S = {batch}, {length}, {states}, got {shape}"
        )
    if not x.shape[2] or channels % x.shape[2]:
        raise ValueError(f"{name} has {x.shape[2]} groups, which do not divide the {channels} channels of x")


def _check_per_channel(inputs: Inputs, channels: int, *names: str) -> None:
    for name in names:
        x = getattr(inputs, name)
        if x is not None and tuple(x.shape) != (channels,):
            raise ValueError(f"{name} must be (C,) with C = {channels}, got {tuple(x.shape)}")


def _check_at_most_0(name: str, x: Tensor, why: str) -> None:
    if _readable(x) and not bool((x <= 0).all()):
        raise ValueError(f"{name} must be at most 0, but reaches {x.detach().max().item():.4g}: {why}")


def _check_steps(dt: Tensor, bias: Tensor | None) -> None:
    steps = dt if bias is None else dt + bias
    if _readable(steps) and not bool((steps >= 0).all()):
        least = steps.detach().min().item()
        raise ValueError(f"steps dt must be at least 0, but reach {least:.4g}; is softplus=True missing?")


def _readable(x: Tensor) -> bool:
    """Whether its values can be looked at without breaking a graph or waiting for a device."""
    return not torch.compiler.is_compiling() and is_plain(x.resolve_neg() if x.is_cpu else x)
