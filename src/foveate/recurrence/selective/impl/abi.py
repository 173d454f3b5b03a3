"""The scans' C structures (kernels/cpu/csrc/scan_abi.h), and how tensors are described to them."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_int64, c_void_p

import torch
from torch import Tensor

from foveate.kernels.cpu.call import StreamArgument

SEGMENT = 64  # tokens from one mark to the next


class ScanArgument(Structure):
    """A call of the scan's kernels."""

    _fields_ = (
        *((name, StreamArgument) for name in ("x", "dt", "z", "b", "c", "out")),
        *((name, c_void_p) for name in ("rates", "skip", "bias", "first", "last", "marks", "starts")),
        *((name, c_int64) for name in ("sequences", "length", "channels", "states", "groups_b", "groups_c")),
        *((name, c_int64) for name in ("softplus", "threads")),
        *((name, StreamArgument) for name in ("grad_out", "dx", "ddt", "dz", "db", "dc")),
        *((name, c_void_p) for name in ("grad_last", "d_rates", "d_skip", "d_bias", "d_first")),
    )


class ConvArgument(Structure):
    """A call of the convolution's kernels."""

    _fields_ = (
        *((name, StreamArgument) for name in ("x", "out")),
        *((name, c_void_p) for name in ("weight", "bias", "first", "last", "starts")),
        *((name, c_int64) for name in ("sequences", "length", "channels", "width", "silu", "threads")),
        *((name, StreamArgument) for name in ("grad_out", "dx")),
        *((name, c_void_p) for name in ("grad_last", "d_weight", "d_bias", "d_first")),
    )


def plain(x: Tensor | None) -> Tensor | None:
    """A parameter or state as the kernels read it: float32, contiguous."""
    return None if x is None else x.detach().float().contiguous()


def buffer(like: Tensor, *shape: int) -> Tensor:
    """Room for numbers that a kernel writes: float32, wherever default dtypes and devices stand."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def starts_of(lengths: Sequence[int] | None) -> Tensor | None:
    """Where packed sequences start, and the last ends."""
    return None if lengths is None else torch.tensor([0, *lengths], dtype=torch.int64, device="cpu").cumsum(0)


def num_marks(x: Tensor, state: Tensor) -> int:
    """Places for states before every SEGMENT tokens of every sequence."""
    return x.shape[0] * x.shape[1] // SEGMENT + state.shape[0]


def like(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """A gradient in its parameter's dtype."""
    return None if grad is None or parameter is None else grad.to(parameter.dtype)
