"""Windows on grids, for which the native kernels have products of their own: no pair outside a window is formed."""

from __future__ import annotations

import ctypes
import math
from ctypes import Structure, byref, c_int64
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.attention.bias import Alibi, Bias, Dense, PerHead, RelativeTable
from foveate.attention.impl.bias_arguments import Biases
from foveate.kernels.cpu import call as c
from foveate.kernels.cpu.loader import num_threads, status
from foveate.layouts.kinds import Grid, Layout, patch_shape
from foveate.patterns.algebra import Pattern
from foveate.patterns.rules.axes import Near
from foveate.patterns.rules.grid import Neighborhood
from foveate.patterns.select.selection import TILE

LANES = 16  # of the widest vectors


class Windows(NamedTuple):
    """For each axis of a grid its length, how many keys a query sees, how far apart, and whether none after itself."""

    dims: tuple[int, ...]
    size: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]


class WindowsArgument(Structure):
    """FoveateNeighborhood of csrc/neighborhood.h."""

    _fields_ = (("axes", c_int64), ("dims", c.Four), ("size", c.Four), ("dilation", c.Four), ("causal", c.Four))


def windows_of(pattern: Pattern, layout: Layout, num_queries: int) -> Windows | None:
    """The windows that a pattern is, where every token of a grid is a query; else None.

    >>> from foveate import Grid, neighborhood
    >>> windows_of(neighborhood((3, 5)), Grid(8, 8), num_queries=64)
    Windows(dims=(8, 8), size=(3, 5), dilation=(1, 1), causal=(False, False))
    >>> windows_of(neighborhood(3, stride=3), Grid(8, 8), num_queries=64) is None
    True
    """
    if not isinstance(pattern, Neighborhood) or not isinstance(layout, Grid) or num_queries != layout.length:
        return None
    rules = [rule for rule in pattern.rules(layout.dims) if isinstance(rule, Near) and rule.stride == 1 and rule.clamp]
    if len(rules) < layout.num_axes:
        return None
    columns = zip(*((rule.size, rule.kernel, rule.dilation, rule.causal) for rule in rules), strict=True)
    return Windows(*columns)


def pays(windows: Windows, dtype: torch.dtype, dim: int) -> bool:
    """Whether forward and backward together are faster than the kernels for tiles of 64 x 64 pairs.

    Those form more pairs, but each in less time, and bfloat16 ones in far less where the processor multiplies them.

    >>> pays(Windows((56, 56), (7, 7), (1, 1), (False, False)), torch.float32, dim=32)
    True
    >>> pays(Windows((7, 7), (7, 7), (1, 1), (False, False)), torch.float32, dim=32)
    False
    """
    multiplies_bfloat16 = dtype == torch.bfloat16 and status().isa in ("amx", "avx512bf16")
    return _pairs_saved(windows) > (1.3 + dim / 32 if multiplies_bfloat16 else 1.4)


def _pairs_saved(windows: Windows) -> float:
    """Pairs that tiles would form for each one in a window, times the share of vectors that these kernels fill."""
    patch = patch_shape(TILE, len(windows.dims))
    axes = zip(windows.dims, windows.size, windows.dilation, patch, strict=True)
    formed = math.prod(min(side + (size - 1) * step, length) for length, size, step, side in axes)
    row = windows.dims[-1]  # whatever the dilation: queries of several cosets share a vector
    return formed / math.prod(windows.size) * row / (-(-row // LANES) * LANES)


def takes(windows: Windows, biases: tuple[Bias, ...], scale: float) -> bool:
    """Whether the kernels know the biases: dense ones, ALiBi, and tables of relative positions on the same grid.

    >>> from foveate import relative_table
    >>> seen = Windows((8, 8), (3, 3), (1, 1), (False, False))
    >>> own, other = (relative_table(torch.zeros(2, 15, 15), dims) for dims in ((8, 8), (4, 16)))
    >>> takes(seen, (own,), scale=1.0), takes(seen, (other,), scale=1.0)
    (True, False)
    """
    return all(scale != 0 and _takes(windows, bias) for bias in biases)


def _takes(windows: Windows, bias: Bias) -> bool:
    if isinstance(bias, RelativeTable) and (bias.dims != windows.dims or bias.offset):
        return False
    if isinstance(bias, Alibi) and bias.offset:
        return False
    return type(bias) in (Dense, PerHead, Alibi, RelativeTable) and bias.parameter.numel() < 2**31


def forward(
    windows: Windows, q: Tensor, k: Tensor, v: Tensor, scale: float, biases: tuple[Bias, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Heads out (B, H, N, Dv) and log row sums (B, H, N) in float64."""
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float64)
    held = Biases(biases)
    call = _argument(windows, q, k, v, out, lse, scale, held)
    c.check(_kernels().foveate_neighborhood_forward(byref(call), byref(_windows(windows))))
    return out, lse


def backward(
    windows: Windows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    scale: float,
    biases: tuple[Bias, ...] = (),
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and of each bias's parameter."""
    held = Biases(biases)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    lse, grad_lse = lse.contiguous(), None if grad_lse is None else grad_lse.float().contiguous()
    call, grads = _argument(windows, q, k, v, out, lse, scale, held), held.grads()
    call.grad_out = c.tensor(grad_out, q.dtype, *out.shape)
    call.grad_lse = c.pointer(grad_lse, torch.float32, *q.shape[:3])
    call.dq, call.dk, call.dv = (c.tensor(x, q.dtype, *x.shape) for x in (dq, dk, dv))
    c.check(_kernels().foveate_neighborhood_backward(byref(call), byref(_windows(windows))))
    return (dq, dk, dv, *(grad.to(bias.parameter.dtype) for bias, grad in zip(biases, grads, strict=True)))


def _kernels() -> ctypes.CDLL:
    return c.kernels("neighborhood", c.AttendArgument, WindowsArgument)


def _windows(windows: Windows) -> WindowsArgument:
    return WindowsArgument(len(windows.dims), *(c.Four(*setting) for setting in windows))


def _argument(
    windows: Windows, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, held: Biases
) -> c.AttendArgument:
    tokens, (batch, heads, _, dim), value_dim = math.prod(windows.dims), q.shape, v.shape[3]
    return c.AttendArgument(
        q=c.tensor(q, q.dtype, batch, heads, tokens, dim),
        k=c.tensor(k, q.dtype, batch, k.shape[1], tokens, dim),
        v=c.tensor(v, q.dtype, batch, v.shape[1], tokens, value_dim),
        out=c.tensor(out, q.dtype, batch, heads, tokens, value_dim),
        lse=c.pointer(lse, torch.float64, batch, heads, tokens),
        dtype=c.DTYPES[q.dtype],
        kind=c.KINDS["softmax"],
        threads=num_threads(),
        batch=batch,
        num_queries=tokens,
        num_keys=tokens,
        dim=dim,
        value_dim=value_dim,
        scale=scale,
        num_biases=len(held.arguments),
        biases=held.arguments,
    )
