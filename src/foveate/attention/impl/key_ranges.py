"""attend_ranges by a native CPU kernel, which reads the keys and values in the ranges and no others."""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.attention.impl.short import described
from foveate.attention.key_ranges import RangesCall, Scored
from foveate.dispatch import Implementation
from foveate.kernels.cpu import call as c
from foveate.kernels.cpu.loader import library, status
from foveate.patterns.band import Band
from foveate.plain import is_plain

EVERY = Band(0, 0)  # ranges stand in its place
SEEN = struct.Struct("q" * 9)  # FoveateRanges of csrc/abi.h

Kernel = Callable[[bytes, bytes], int]


class Plan(NamedTuple):
    """The kernel's two arguments, what it writes to, and what it reads besides the call's tensors."""

    call: bytes
    seen: bytes
    out: Scored
    held: RangesCall


def short(call: RangesCall) -> Scored | None:
    """The result of a plain call; None if it is none."""
    planned = _planned(call)
    return None if planned is None else run(planned)


def refuse(call: RangesCall) -> str | None:
    """Why the kernel cannot run the call; None if it can."""
    if library() is None:
        return status().reason
    if not isinstance(call.weights, str) or call.weights not in c.KINDS:
        return f"it has {', '.join(c.KINDS)} weights without sinks or biases of their own"
    if any(x is not None and x.requires_grad for x in (call.q, call.k, call.v, call.bias)) and torch.is_grad_enabled():
        return "it has no gradients"
    if _planned(call) is None:
        return "it takes plain CPU tensors of one dtype (float32, bfloat16, float16), lists in order and a float32 bias"
    return None


def plan(call: RangesCall) -> Plan:
    planned = _planned(call)
    assert planned is not None, "plan is called where refuse has nothing to say"
    return planned


def run(planned: Plan) -> Scored:
    kernel = _kernel()
    assert kernel is not None
    c.check(kernel(planned.call, planned.seen))
    return planned.out


NATIVE: Implementation[RangesCall, Plan, Scored] = Implementation("native", refuse, plan, run)


def _planned(call: RangesCall) -> Plan | None:
    kind = c.KINDS.get(call.weights) if isinstance(call.weights, str) else None
    if kind is None or _kernel() is None:
        return None
    q, num_keys = call.q, call.k.shape[2]
    found = described(q, call.k, call.v, kind, call.scale, EVERY)
    if found is None:
        return None
    argument, out = found
    logits = q.new_empty((*q.shape[:3], num_keys), dtype=torch.float32) if call.logits else None
    listed = _listed(call, logits)
    return None if listed is None else Plan(argument, listed, Scored(out, logits), call)


def _listed(call: RangesCall, logits: Tensor | None) -> bytes | None:
    """The second argument of the kernel; None where the bias or the lists are none that it reads."""
    seen, bias = call.seen, call.bias
    starts, ranges = _address(seen.starts), _address(seen.ranges)
    if not starts or (not ranges and len(seen.ranges)):
        return None
    to = 0 if logits is None else c.strided(logits, (torch.float32,), logits.shape)
    if bias is None:
        return SEEN.pack(seen.batches, seen.heads, starts, ranges, 0, 0, 0, 0, to)
    if bias.dtype != torch.float32 or (bias.requires_grad and torch.is_grad_enabled()) or not is_plain(bias):
        return None
    address = c.strided(bias, (torch.float32,), bias.shape)
    strides = bias.expand(call.q.shape[0], call.q.shape[1], 1, call.k.shape[2]).stride()
    return SEEN.pack(seen.batches, seen.heads, starts, ranges, address, strides[0], strides[1], strides[3], to)


def _address(numbers: Tensor | array[int]) -> int:
    """Where the kernel reads a list; 0 if it does not lie in order."""
    if isinstance(numbers, Tensor):
        return c.strided(numbers, (torch.int64,), numbers.shape) if numbers.is_contiguous() else 0
    return numbers.buffer_info()[0]


@lru_cache(maxsize=1)
def _kernel() -> Kernel | None:
    found = library()
    if found is None:
        return None
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p, ctypes.c_char_p)(("foveate_attend_ranges", found))
