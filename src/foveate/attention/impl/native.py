"""attend by native CPU kernels: any band or selection, forward and backward."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from foveate.attention.bias import Alibi, Bias, Dense, LogDecay, PerHead, RelativeTable
from foveate.attention.call import Call
from foveate.attention.documents import runs_by_document
from foveate.attention.gaps import Positioned
from foveate.attention.impl import neighborhood
from foveate.attention.impl import spec as shared
from foveate.attention.impl.neighborhood import Windows, pays, windows_of
from foveate.attention.impl.spec import TILE, WIDEST, Spec
from foveate.attention.partial import Partial
from foveate.kernels.cpu import call as c
from foveate.kernels.cpu.loader import library, num_threads, status
from foveate.layouts.kinds import Layout
from foveate.patterns.algebra import Pattern
from foveate.patterns.band import Band, band_of
from foveate.patterns.select.selection import Selection
from foveate.plain import traced


def refuse(call: Call) -> str | None:
    """Why this implementation cannot run the call; None if it can."""
    if call.dropout is not None:
        return "it has no dropout on weights"
    if call.q.device.type != "cpu":
        return f"it runs on CPU, not on {call.q.device.type}"
    if call.q.dtype not in c.DTYPES:
        return f"it has float32, bfloat16 and float16, not {str(call.q.dtype).removeprefix('torch.')}"
    if max(call.q.shape[3], call.v.shape[3]) > WIDEST:
        return f"it takes up to {WIDEST} channels a head, not {max(call.q.shape[3], call.v.shape[3])}"
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        if c.misaligned(x):
            return f"{name} is not aligned in memory to its numbers of {x.element_size()} bytes"
    if any(isinstance(bias, LogDecay) for bias in call.biases) and call.pattern.tensors and traced(*call.tensors):
        return "whether padding lies between tokens, whose gates would count, is seen before it gets the decay"
    for bias in call.biases:
        known = (Dense, PerHead, Alibi, RelativeTable, LogDecay)
        if type(bias) not in known and not (isinstance(bias, Positioned) and runs_by_document(call)):
            return f"it does not know the bias {type(bias).__name__}"
    return _absence() or shared.refuse(call)


@torch.compiler.assume_constant_result  # torch.compile need not look into how libraries are loaded
def _absence() -> str | None:
    return status().reason if library() is None else None


def run(call: Call) -> Partial:
    """Select, then attend."""
    if any(isinstance(bias, LogDecay) for bias in call.biases):
        call = replace(call, biases=tuple(term for bias in call.biases for term in _terms(bias, call.num_queries)))
    return shared.run(call, "native", cast(shared.Kernels, sys.modules[__name__]))


def _terms(bias: Bias, num_queries: int) -> tuple[Bias, ...]:
    return bias.as_dense(num_queries) if isinstance(bias, LogDecay) else (bias,)


def sees(q: Tensor, k: Tensor, pattern: Pattern, layout: Layout, scale: float, *, plain: bool) -> shared.Seen:
    """A band where the pattern is one, windows on a grid where it is such and they are faster, else its selection."""
    band = band_of(pattern, layout)
    if band is not None:
        return band
    windows = windows_of(pattern, layout, q.shape[2]) if plain and q.shape[2] == k.shape[2] else None
    if windows is not None and pays(windows, q.dtype, q.shape[3]):
        return windows
    return pattern.select(q, k, layout, tile=TILE, scale=scale)


def forward(spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Heads out (B, H, N, Dv) and log row sums (B, H, N) in float64, zeros for unnormalised weights."""
    if isinstance(spec.seen, Windows):
        return neighborhood.forward(spec.seen, q, k, v, spec.scale)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    softmax = spec.kind == "softmax"
    lse = (q.new_empty if softmax else q.new_zeros)(q.shape[:3], dtype=torch.float64)
    arguments, held = _arguments(spec, q, k, v, out, lse if softmax else None)
    c.check(_library().foveate_attend_forward(ctypes.byref(arguments)))
    del held
    return out, lse


def backward(
    spec: Spec, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and of each bias's parameter."""
    if isinstance(spec.seen, Windows):
        return neighborhood.backward(spec.seen, q, k, v, out, lse, grad_out, grad_lse, spec.scale)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    grad_lse, lse = grad_lse.float().contiguous(), lse.contiguous()  # named, so that they outlive the call
    arguments, held = _arguments(spec, q, k, v, out, lse)
    grads = [q.new_zeros(bias.parameter.shape, dtype=torch.float32) for bias in spec.biases]
    for bias, grad in zip(held.biases, grads, strict=True):
        bias.grad = c.pointer(grad, torch.float32, *grad.shape)
    arguments.grad_out = c.tensor(grad_out, q.dtype, *out.shape)
    arguments.grad_lse = c.pointer(grad_lse, torch.float32, *q.shape[:3])
    arguments.dq, arguments.dk, arguments.dv = (c.tensor(x, q.dtype, *x.shape) for x in (dq, dk, dv))
    c.check(_library().foveate_attend_backward(ctypes.byref(arguments)))
    parameters = (grad.to(bias.parameter.dtype) for bias, grad in zip(spec.biases, grads, strict=True))
    return (dq, dk, dv, *parameters)


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None, "refuse() lets no call through without a library"
    return c.declared(found)


class _Held:
    """What the arguments point at, kept alive during a call."""

    def __init__(self, biases: list[c.BiasArgument], tensors: list[Tensor]) -> None:
        self.biases = (c.BiasArgument * len(biases))(*biases)
        self.tensors = tensors


def _arguments(
    spec: Spec, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None
) -> tuple[c.AttendArgument, _Held]:
    parameters = [bias.parameter.detach().float().contiguous() for bias in spec.biases]
    pairs = zip(spec.biases, parameters, strict=True)
    held = _Held([_bias(bias, parameter) for bias, parameter in pairs], parameters)
    (batch, heads, num_queries, dim), (num_keys, value_dim) = q.shape, v.shape[2:]
    arguments = c.AttendArgument(
        c.tensor(q, q.dtype, batch, heads, num_queries, dim),
        c.tensor(k, q.dtype, batch, k.shape[1], num_keys, dim),
        c.tensor(v, q.dtype, batch, v.shape[1], num_keys, value_dim),
        c.tensor(out, q.dtype, batch, heads, num_queries, value_dim),
        c.pointer(lse, torch.float64, batch, heads, num_queries),
        c.DTYPES[q.dtype],
        c.KINDS[spec.kind],
        num_threads(),
        batch,
        num_queries,
        num_keys,
        dim,
        value_dim,
        spec.scale,
        spec.softcap or 0.0,
        _seen(spec.seen, batch, heads, num_queries, num_keys),
        len(parameters),
        held.biases,
    )
    return arguments, held


def _seen(seen: shared.Seen, batch: int, heads: int, num_queries: int, num_keys: int) -> c.SelectionArgument:
    if isinstance(seen, Band):
        return c.SelectionArgument(seen.low, seen.high)
    if not isinstance(seen, Selection) or (seen.tile, seen.num_queries, seen.num_keys) != (TILE, num_queries, num_keys):
        raise TypeError(f"a native kernel was to run tiles of {num_queries} x {num_keys} pairs, but was given {seen}")
    if seen.batches not in (1, batch) or heads % seen.heads:
        raise TypeError(f"a selection for {seen.batches} entries and {seen.heads} heads, but q has {batch} and {heads}")
    q_tiles, k_tiles = _tiles(seen.q_slots, num_queries), _tiles(seen.k_slots, num_keys)
    rows, tiles, columns = seen.batches * seen.heads * q_tiles, seen.num_tiles, seen.num_columns
    pointers = (
        c.pointer(seen.tile_starts, torch.int64, rows + 1),
        c.pointer(seen.tile_ids, torch.int32, tiles),
        c.pointer(seen.mask_ids, torch.int32, tiles),
        c.pointer(seen.masks, torch.uint8, seen.masks.shape[0], TILE, TILE // 8),
        c.pointer(seen.column_starts, torch.int64, rows + 1),
        c.pointer(seen.column_ids, torch.int32, columns),
        c.pointer(seen.column_masks, torch.uint8, columns, TILE // 8),
        c.pointer(seen.q_slots, torch.int64, q_tiles * TILE),
        c.pointer(seen.k_slots, torch.int64, k_tiles * TILE),
    )
    return c.SelectionArgument(0, 0, seen.batches, seen.heads, q_tiles, *pointers, k_tiles * TILE)


def _tiles(slots: Tensor | None, length: int) -> int:
    return -(-length // TILE) if slots is None else slots.numel() // TILE


def _bias(bias: Bias, parameter: Tensor) -> c.BiasArgument:
    address = c.pointer(parameter, torch.float32, *parameter.shape)
    argument = c.BiasArgument(data=address, size=parameter.numel())
    if isinstance(bias, Dense):
        sides = zip(parameter.shape, parameter.stride(), strict=True)
        argument.stride = c.Four(*(stride if size > 1 else 0 for size, stride in sides))
    elif isinstance(bias, PerHead):
        argument.stride = c.Four(0, int(parameter.numel() > 1), 0, 0)
    elif isinstance(bias, Alibi):
        argument.kind, argument.offset = c.ALIBI, bias.offset
    else:
        assert isinstance(bias, RelativeTable)
        argument.kind, argument.offset, argument.axes = c.RELATIVE, bias.offset, len(bias.reach)
        argument.dims, argument.reach = c.Four(*bias.dims), c.Four(*bias.reach)
    return argument
