"""Lists of whole numbers that users give: lengths of sequences, positions of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index
from typing import Any

import torch
from torch import Tensor


def whole_numbers(what: str, values: Iterable[Any]) -> tuple[int, ...]:
    """The values as Python's integers, of which none overflows; TypeError or ValueError for anything but counts.

    >>> whole_numbers("lengths", torch.tensor([3, 0], dtype=torch.uint8))
    (3, 0)
    >>> whole_numbers("lengths", [5.0])
    Traceback (most recent call last):
        ...
    TypeError: lengths must be whole numbers such as [3, 5]; got [5.0]
    """
    if isinstance(values, list | tuple) and all(type(n) is int or isinstance(n, torch.SymInt) for n in values):
        numbers = tuple(values)
    else:
        numbers = _read(what, values)
    if any(n < 0 for n in numbers):
        raise ValueError(f"{what} must each be 0 or more; got {list(numbers)}")
    return numbers


def _read(what: str, values: Iterable[Any]) -> tuple[int, ...]:
    """Of tensors, arrays and lists of their entries; truth values are no numbers."""
    listed = values.tolist() if isinstance(values, Tensor) else values
    try:
        found = list(listed)
        if not any("bool" in type(n).__name__ or (isinstance(n, Tensor) and n.dtype == torch.bool) for n in found):
            return tuple(index(n) for n in found)
    except TypeError:  # no list, or of what is no whole number
        pass
    raise TypeError(f"{what} must be whole numbers such as [3, 5]; got {values!r}")
