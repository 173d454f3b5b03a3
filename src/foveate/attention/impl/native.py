"""attend by native CPU kernels: any band or selection, forward and backward."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch
from torch import Tensor

from foveate.attention.bias import Alibi, Bias, Dense, LogDecay, PerHead, RelativeTable
from foveate.attention.call import Call
from foveate.attention.gaps import Positioned
from foveate.attention.impl import neighborhood
from foveate.attention.impl.bias_arguments import Biases
from foveate.attention.impl.documents import runs_by_document
from foveate.attention.impl.neighborhood import Windows, pays, takes, windows_of
from foveate.attention.impl.plan import WIDEST, Plan, Selected
from foveate.kernels.cpu import call as c
from foveate.kernels.cpu.loader import library, num_threads, status
from foveate.layouts.kinds import Layout
from foveate.patterns.algebra import Pattern
from foveate.patterns.band import Band, band_of
from foveate.patterns.select import build
from foveate.patterns.select.selection import TILE, Selection
from foveate.plain import traced

# Keys that a query attends to in the time that it takes to gather it with others and to put it back, measured.
KEYS_OF_VISIT = {torch.float32: 64, torch.float16: 64, torch.bfloat16: 128}


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
    return _absence()


@torch.compiler.assume_constant_result  # torch.compile need not look into how libraries are loaded
def _absence() -> str | None:
    return status().reason if library() is None else None


def in_known_terms(call: Call) -> Call:
    """Log decays as the biases that kernels add up."""
    if not any(isinstance(bias, LogDecay) for bias in call.biases):
        return call
    return replace(call, biases=tuple(term for bias in call.biases for term in _terms(bias, call.num_queries)))


def _terms(bias: Bias, num_queries: int) -> tuple[Bias, ...]:
    return bias.as_dense(num_queries) if isinstance(bias, LogDecay) else (bias,)


def select(
    q: Tensor, k: Tensor, pattern: Pattern, layout: Layout, scale: float, *, plain: bool, biases: tuple[Bias, ...] = ()
) -> Selected:
    """A band where the pattern is one, windows on a grid where it is such and they are faster, else its selection."""
    band = band_of(pattern, layout)
    if band is not None:
        return band
    windows = windows_of(pattern, layout, q.shape[2]) if plain and q.shape[2] == k.shape[2] else None
    if windows is not None and pays(windows, q.dtype, q.shape[3]) and takes(windows, biases, scale):
        return windows
    return build.select(pattern, q, k, layout, tile=TILE, scale=scale, keys_of_visit=KEYS_OF_VISIT[q.dtype])


def forward(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Heads out (B, H, N, Dv) and log row sums (B, H, N) in float64, zeros for unnormalised weights."""
    if isinstance(plan.selected, Windows):
        return neighborhood.forward(plan.selected, q, k, v, plan.scale, plan.biases)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    softmax = plan.kind == "softmax"
    lse = (q.new_empty if softmax else q.new_zeros)(q.shape[:3], dtype=torch.float64)
    arguments, held = _arguments(plan, q, k, v, out, lse if softmax else None)
    c.check(c.kernels("attend", c.AttendArgument).foveate_attend_forward(ctypes.byref(arguments)))
    del held
    return out, lse


def backward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and of each bias's parameter."""
    if isinstance(plan.selected, Windows):
        return neighborhood.backward(plan.selected, q, k, v, out, lse, grad_out, grad_lse, plan.scale, plan.biases)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    grad_lse, lse = grad_lse.float().contiguous(), lse.contiguous()  # named, so that they outlive the call
    arguments, held = _arguments(plan, q, k, v, out, lse)
    grads = held.grads()
    arguments.grad_out = c.tensor(grad_out, q.dtype, *out.shape)
    arguments.grad_lse = c.pointer(grad_lse, torch.float32, *q.shape[:3])
    arguments.dq, arguments.dk, arguments.dv = (c.tensor(x, q.dtype, *x.shape) for x in (dq, dk, dv))
    c.check(c.kernels("attend", c.AttendArgument).foveate_attend_backward(ctypes.byref(arguments)))
    return (dq, dk, dv, *(grad.to(bias.parameter.dtype) for bias, grad in zip(plan.biases, grads, strict=True)))


def _arguments(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None
) -> tuple[c.AttendArgument, Biases]:
    held = Biases(plan.biases)
    (batch, heads, num_queries, dim), (num_keys, value_dim) = q.shape, v.shape[2:]
    arguments = c.AttendArgument(
        c.tensor(q, q.dtype, batch, heads, num_queries, dim),
        c.tensor(k, q.dtype, batch, k.shape[1], num_keys, dim),
        c.tensor(v, q.dtype, batch, v.shape[1], num_keys, value_dim),
        c.tensor(out, q.dtype, batch, heads, num_queries, value_dim),
        c.pointer(lse, torch.float64, batch, heads, num_queries),
        c.DTYPES[q.dtype],
        c.KINDS[plan.kind],
        num_threads(),
        batch,
        num_queries,
        num_keys,
        dim,
        value_dim,
        plan.scale,
        plan.softcap or 0.0,
        _selection(plan.selected, batch, heads, num_queries, num_keys),
        len(plan.biases),
        held.arguments,
    )
    return arguments, held


def _selection(chosen: Selected, batch: int, heads: int, num_queries: int, num_keys: int) -> c.SelectionArgument:
    if isinstance(chosen, Band):
        return c.SelectionArgument(chosen.low, chosen.high)
    if not isinstance(chosen, Selection) or (chosen.tile, chosen.num_queries, chosen.num_keys) != (
        TILE,
        num_queries,
        num_keys,
    ):
        raise TypeError(f"a native kernel was to run tiles of {num_queries} x {num_keys} pairs, but was given {chosen}")
    if chosen.batches not in (1, batch) or heads % chosen.heads:
        raise TypeError(
            f"a selection for {chosen.batches} entries and {chosen.heads} heads, but q has {batch} and {heads}"
        )
    q_tiles, k_tiles = _tiles(chosen.q_slots, num_queries), _tiles(chosen.k_slots, num_keys)
    rows, tiles, columns = chosen.batches * chosen.heads * q_tiles, chosen.num_tiles, chosen.num_columns
    pointers = (
        c.pointer(chosen.tile_starts, torch.int64, rows + 1),
        c.pointer(chosen.tile_ids, torch.int32, tiles),
        c.pointer(chosen.mask_ids, torch.int32, tiles),
        c.pointer(chosen.masks, torch.uint8, chosen.masks.shape[0], TILE, TILE // 8),
        c.pointer(chosen.column_starts, torch.int64, rows + 1),
        c.pointer(chosen.column_ids, torch.int32, columns),
        c.pointer(chosen.column_masks, torch.uint8, columns, TILE // 8),
        c.pointer(chosen.q_slots, torch.int64, q_tiles * TILE),
        c.pointer(chosen.k_slots, torch.int64, k_tiles * TILE),
    )
    num_runs = 0 if chosen.runs is None else chosen.runs.shape[0]
    gathered = (
        c.pointer(chosen.run_starts, torch.int64, rows + 1),
        c.pointer(chosen.runs, torch.int32, num_runs, 2),
        c.pointer(chosen.run_masks, torch.uint8, num_runs, TILE // 8),
    )
    return c.SelectionArgument(0, 0, chosen.batches, chosen.heads, q_tiles, *pointers, k_tiles * TILE, *gathered)


def _tiles(slots: Tensor | None, length: int) -> int:
    return -(-length // TILE) if slots is None else slots.numel() // TILE
