"""The short way for one token of a selective scan without gradients: straight to a native kernel.

A decoding step computes for a few microseconds; checking and describing a general call takes fifty. Whatever is not
plain, or not right, gets None and goes the long way, which says what is wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.kernels.cpu import call as c
from foveate.kernels.cpu.loader import num_threads
from foveate.kernels.cpu.short import addresses, entry, head_of
from foveate.recurrence.selective.impl.abi import ScanArgument

HEAD, REST = head_of(ScanArgument, before="grad_out")  # no gradients
ABSENT = (0,) * 6


def scan_token(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    state: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Out and state of a plain call; None if it is none."""
    streams, parameters = (x, dt, z, B, C), (A, D, dt_bias, state)
    at = addresses(*streams, *parameters)
    if at is None or not (all(map(_is_parameter, parameters)) and _are_tokens(x, dt, z) and A.dim() == 2):
        return None
    batch, _, channels = x.shape
    states = A.shape[-1]
    groups = _groups(B, batch, channels, states), _groups(C, batch, channels, states)
    shapes = ((channels, states), (channels,), (channels,), (batch, channels, states))
    fits = all(p is None or p.shape == shape for p, shape in zip(parameters, shapes, strict=True))
    kernel = entry("foveate_scan_step")
    if not (fits and batch and channels and states and all(groups)) or kernel is None:
        return None
    first = torch.zeros(shapes[-1], dtype=torch.float32, device="cpu") if state is None else state
    out = torch.empty((batch, 1, channels), dtype=x.dtype, device="cpu")
    last = torch.empty((batch, channels, states), dtype=torch.float32, device="cpu")
    described = (_described(*pair) for pair in zip((*streams, out), (*at[:5], out.data_ptr()), strict=True))
    sizes = (batch, 1, channels, states, *groups, softplus, num_threads())
    head = HEAD.pack(
        *(number for one in described for number in one), *at[5:8], first.data_ptr(), last.data_ptr(), 0, 0, *sizes
    )
    found = kernel(head + REST)
    if found == c.OUT_OF_RANGE:  # a rate above 0, or a step below it
        return None
    c.check(found)
    return out, last


def _are_tokens(x: Tensor, dt: Tensor, z: Tensor | None) -> bool:
    return x.dim() == 3 and x.shape[1] == 1 and dt.shape == x.shape and (z is None or z.shape == x.shape)


def _is_parameter(x: Tensor | None) -> bool:
    return x is None or (x.dtype == torch.float32 and x.is_contiguous())


def _groups(x: Tensor, batch: int, channels: int, states: int) -> int:
    """How many groups B or C has; 0 if it does not fit."""
    groups = x.shape[2] if x.dim() == 4 else 1
    shape = (batch, 1, groups, states) if x.dim() == 4 else (batch, 1, states)
    return groups if x.shape == shape and groups and channels % groups == 0 else 0


def _described(x: Tensor | None, at: int) -> tuple[int, ...]:
    if x is None:
        return ABSENT
    stride = x.stride()
    if len(stride) == 3:  # channels of x, or states of B and C without groups
        stride = (stride[0], stride[1], stride[2], stride[2])
    return (at, c.DTYPES[x.dtype], *stride)
