"""What a pattern says at one moment, as a key of dictionaries."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import is_dataclass
from enum import Enum
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.layouts.kinds import Layout
from foveate.patterns.algebra import Pattern
from foveate.patterns.identity import fields_of

DEEPEST = 16  # objects within objects
PLAIN = frozenset((bool, int, str, bytes, type(None), type(...), range))
NAMES = (type, ModuleType, Enum, torch.dtype, torch.device, np.dtype)


class Unknown(Exception):
    """An object of which nobody can tell what it holds."""


def snapshot(thing: object, depth: int = 0) -> Hashable:
    """All that an object holds now, tensors by their content; Unknown where that cannot be told.

    >>> from foveate import key_padding
    >>> mask = torch.tensor([[True, True, False]])
    >>> before, again = snapshot(key_padding(mask)), snapshot(key_padding(mask.clone()))
    >>> mask.numpy()[0, 2] = True
    >>> before == again, before == snapshot(key_padding(mask))
    (True, False)
    """
    kind = type(thing)
    if kind in PLAIN:
        return kind, thing
    if depth > DEEPEST:
        raise Unknown(f"a {kind.__name__} within too many others")
    if isinstance(thing, Pattern):
        return kind, *[(name, snapshot(value, depth + 1)) for name, value in fields_of(thing).items()]
    if kind is tuple:
        return kind, *[snapshot(member, depth + 1) for member in thing]  # type: ignore[attr-defined]
    if isinstance(thing, NAMES):
        return thing
    if isinstance(thing, (float, complex)):
        return kind, repr(thing)  # -0.0 == 0.0, nan != nan
    if isinstance(thing, Tensor):
        return _of_tensor(thing)
    if isinstance(thing, np.ndarray):
        return _of_array(thing)
    if isinstance(thing, FunctionType):
        return _of_function(thing, depth + 1)
    return kind, _of_members(thing, depth + 1)


def _of_members(thing: object, depth: int) -> Hashable:
    if type(thing) is list or (isinstance(thing, tuple) and hasattr(thing, "_fields")):
        return tuple(snapshot(member, depth) for member in thing)  # type: ignore[attr-defined]
    if isinstance(thing, (set, frozenset)):
        return frozenset(snapshot(member, depth) for member in thing)
    if type(thing) is dict:
        return tuple((snapshot(name, depth), snapshot(value, depth)) for name, value in thing.items())
    if isinstance(thing, Layout) or is_dataclass(thing):
        return tuple((name, snapshot(value, depth)) for name, value in fields_of(thing).items())
    raise Unknown(f"what a {type(thing).__name__} holds cannot be told")


def _of_function(function: Callable[..., Any], depth: int) -> Hashable:
    """A function by its code, its defaults, what it closes over, and the variables of its module that it reads."""
    assert isinstance(function, FunctionType)
    codes = [function.__code__]
    for code in codes:
        codes.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
    names = sorted({name for code in codes for name in code.co_names} & function.__globals__.keys())
    read = tuple((name, _of_global(function.__globals__[name], depth)) for name in names)
    try:
        closed = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError as empty:
        raise Unknown("a function that reads a variable without a value") from empty
    held = (closed, function.__defaults__, function.__kwdefaults__)
    return FunctionType, function.__code__, read, snapshot(held, depth)


def _of_global(thing: object, depth: int) -> Hashable:
    if callable(thing) and isinstance(thing, Hashable):  # by its name: it may read others in turn, without end
        return thing
    return snapshot(thing, depth)


def _of_array(numbers: np.ndarray) -> Hashable:
    if numbers.dtype.hasobject:
        raise Unknown("what an array of objects holds cannot be told")
    return numbers.dtype, numbers.shape, _digest(np.ascontiguousarray(numbers).reshape(-1).view(np.uint8))


def _of_tensor(numbers: Tensor) -> Hashable:
    if type(numbers) not in (Tensor, torch.nn.Parameter) or numbers.layout != torch.strided:
        raise Unknown(f"what a {type(numbers).__name__} holds cannot be told")
    try:
        plain = numbers.detach().resolve_conj().resolve_neg().cpu().contiguous()
        octets = plain.view(-1).view(torch.uint8).numpy()
    except (RuntimeError, TypeError) as error:  # a tensor without memory of its own
        raise Unknown(str(error)) from error
    return numbers.dtype, tuple(numbers.shape), str(numbers.device), _digest(octets)


def _digest(octets: np.ndarray) -> bytes:
    """To read all of a mask costs far less than to select by it."""
    return hashlib.sha256(octets.data, usedforsecurity=False).digest()
