"""Calls of a microsecond: a kernel's structure packed at once, where ctypes takes ten to fill in its fields.

An operator's short way packs the fields that a plain call has, in the order of the structure, and calls with zeros for
the rest. It looks at its tensors itself (`addresses`), and leaves to the general way whatever is not plain.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator
from ctypes import Array, Structure, c_double
from functools import cache
from typing import Any

import torch
from torch import Tensor

from foveate.kernels.cpu.call import DTYPES
from foveate.kernels.cpu.loader import library
from foveate.plain import is_plain

Kernel = Callable[[bytes], int]


@cache
def entry(name: str) -> Kernel | None:
    """A kernel that takes its structure as bytes; None where there are no kernels."""
    found = library()
    return None if found is None else ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)((name, found))


def head_of(argument: type[Structure], before: str) -> tuple[struct.Struct, bytes]:
    """What packs the fields before one, which a dot may lead into, and zeros for that one and those after it.

    >>> from foveate.kernels.cpu.call import AttendArgument
    >>> head, rest = head_of(AttendArgument, before="k")
    >>> head.format, head.size + len(rest) == ctypes.sizeof(AttendArgument)
    ('qqqqqq', True)
    """
    formats: list[str] = []
    for name, format_ in _flat(argument):
        if name == before or name.startswith(f"{before}."):
            head = struct.Struct("".join(formats))
            return head, bytes(ctypes.sizeof(argument) - head.size)
        formats.append(format_)
    raise ValueError(f"{argument.__name__} has no field {before!r}")


def _flat(kind: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Name and format of each field; all are 8 bytes wide, so that there are no gaps."""
    if issubclass(kind, Structure):
        for field in kind._fields_:
            yield from _flat(field[1], f"{name}.{field[0]}" if name else field[0])
    elif issubclass(kind, Array):
        yield name, kind._length_ * "q"
    else:
        assert ctypes.sizeof(kind) == 8, f"{name} is {ctypes.sizeof(kind)} bytes wide"
        yield name, "d" if kind is c_double else "q"


def addresses(*tensors: Tensor | None) -> list[int] | None:
    """Where tensors lie, 0 for one that is not given; None unless kernels may read each as it is.

    That is, all are plain tensors of dtypes that kernels read, aligned in memory, and none wants a gradient.
    """
    if not is_plain(*tensors):
        return None
    found, wants = [], torch.is_grad_enabled()
    for x in tensors:  # a loop without calls, since decoding steps come by here
        if x is None:
            found.append(0)
            continue
        if x.dtype not in DTYPES or (wants and x.requires_grad):
            return None
        address = x.data_ptr()
        if not address or address % x.element_size():
            return None
        found.append(address)
    return found
