"""Structures packed at once are those that ctypes would fill in."""

from __future__ import annotations

import ctypes
import struct
from ctypes import Array, Structure, c_double

import pytest
import torch

from foveate.kernels.cpu.call import AttendArgument
from foveate.kernels.cpu.loader import library
from foveate.kernels.cpu.short import addresses, entry, head_of
from foveate.recurrence.linear.impl.abi import SEGMENT, RecurArgument
from foveate.recurrence.selective.impl.abi import ScanArgument


def _filled(structure: Structure, first: int = 1) -> int:
    """Fill the fields of a structure with first, first + 1, ...; the number after the last."""
    for name, kind in structure._fields_:
        value = getattr(structure, name)
        if isinstance(value, Structure):
            first = _filled(value, first)
        elif isinstance(value, Array):
            value[:] = range(first, first + len(value))
            first += len(value)
        else:
            address = ctypes.addressof(structure) + getattr(type(structure), name).offset
            packed = struct.pack("d" if kind is c_double else "q", first)
            ctypes.memmove(address, packed, 8)
            first += 1
    return first


@pytest.mark.parametrize(
    ("argument", "before"),
    [
        (AttendArgument, "selection.batches"),
        (AttendArgument, "k"),
        (RecurArgument, "grad_out"),
        (ScanArgument, "grad_out"),
    ],
)
def test_what_is_packed_is_what_ctypes_fills_in(argument: type[Structure], before: str) -> None:
    head, rest = head_of(argument, before)
    filled = argument()
    _filled(filled)
    assert len(rest) % 8 == 0 and not any(rest)
    count = head.size // 8
    assert head.pack(*range(1, count + 1)) == bytes(filled)[: head.size]
    offset, kind = 0, argument
    for part in before.split("."):
        offset += getattr(kind, part).offset
        kind = dict(kind._fields_)[part]
    assert offset == head.size and head.size + len(rest) == ctypes.sizeof(argument)


def test_a_field_nobody_has_is_refused() -> None:
    with pytest.raises(ValueError, match="RecurArgument has no field 'q2'"):
        head_of(RecurArgument, before="q2")


def test_only_plain_readable_memory_goes_the_short_way() -> None:
    x = torch.randn(3, 4)
    given = x, None, x.half(), x.bfloat16(), x[1:].mT
    assert addresses(*given) == [0 if y is None else y.data_ptr() for y in given]
    raw = torch.zeros(4 * 5 + 2, dtype=torch.uint8)
    misaligned = torch.frombuffer(raw.numpy(), dtype=torch.float32, count=4, offset=2)
    for other in (x.double(), x[:0], x.to("meta"), x.clone().requires_grad_(), misaligned):
        assert addresses(x, other) is None
    with torch.no_grad():
        assert addresses(x.clone().requires_grad_()) is not None


@pytest.mark.skipif(library() is None, reason="there are no native kernels here")
def test_entries_are_kept_and_segments_agree() -> None:
    found = library()
    assert found is not None and entry("foveate_recur_forward") is entry("foveate_recur_forward") is not None
    assert found.foveate_recur_segment() == SEGMENT
