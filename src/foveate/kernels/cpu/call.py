"""The kernels' C structures (csrc/abi.h), and how tensors are described to them."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from foveate.kernels.cpu.loader import library
from foveate.plain import is_plain

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KINDS = {"softmax": 0, "sigmoid": 1, "relu": 2}
DENSE, ALIBI, RELATIVE = 0, 1, 2
OUT_OF_RANGE, REFUSED = 2, 3  # what a kernel returns that meets a number, or a description, it does not take

Four = c_int64 * 4


class TensorArgument(Structure):
    """(batch, heads, tokens, channels) of any strides."""

    _fields_ = (("data", c_void_p), ("heads", c_int64), ("stride", Four))


class RowsArgument(Structure):
    """(sequences, heads, tokens, channels) of any strides and dtype; no data: not given."""

    _fields_ = (("data", c_void_p), ("dtype", c_int64), ("heads", c_int64), ("stride", Four))


class StreamArgument(Structure):
    """(batch, tokens, channels) or (batch, tokens, groups, states) of any dtype and strides; null: absent."""

    _fields_ = (("data", c_void_p), ("dtype", c_int64), ("stride", Four))


class BiasArgument(Structure):
    """One additive bias; a null ``grad`` is not wanted."""

    _fields_ = (
        ("kind", c_int64),
        ("data", c_void_p),
        ("grad", c_void_p),
        ("size", c_int64),
        ("stride", Four),
        ("offset", c_int64),
        ("axes", c_int64),
        ("dims", Four),
        ("reach", Four),
    )


class SelectionArgument(Structure):
    """A band of distances, or the lists of a Selection."""

    _fields_ = (
        ("band_low", c_int64),
        ("band_high", c_int64),
        ("batches", c_int64),
        ("heads", c_int64),
        ("num_q_tiles", c_int64),
        ("tile_starts", c_void_p),
        ("tile_ids", c_void_p),
        ("mask_ids", c_void_p),
        ("masks", c_void_p),
        ("column_starts", c_void_p),
        ("column_ids", c_void_p),
        ("column_masks", c_void_p),
        ("q_slots", c_void_p),
        ("k_slots", c_void_p),
        ("num_k_slots", c_int64),
        ("run_starts", c_void_p),
        ("runs", c_void_p),
        ("run_queries", c_void_p),
    )


class AttendArgument(Structure):
    """A call of the attention kernels."""

    _fields_ = (
        ("q", TensorArgument),
        ("k", TensorArgument),
        ("v", TensorArgument),
        ("out", TensorArgument),
        ("lse", c_void_p),
        ("dtype", c_int64),
        ("kind", c_int64),
        ("threads", c_int64),
        ("batch", c_int64),
        ("num_queries", c_int64),
        ("num_keys", c_int64),
        ("dim", c_int64),
        ("value_dim", c_int64),
        ("scale", c_double),
        ("softcap", c_double),
        ("selection", SelectionArgument),
        ("num_biases", c_int64),
        ("biases", POINTER(BiasArgument)),
        ("grad_out", TensorArgument),
        ("dq", TensorArgument),
        ("dk", TensorArgument),
        ("dv", TensorArgument),
        ("grad_lse", c_void_p),
    )


def tensor(x: Tensor, dtype: torch.dtype, *shape: int) -> TensorArgument:
    """Describe a tensor (batch, heads, tokens, channels) of any strides; the caller keeps it alive."""
    return TensorArgument(strided(x, (dtype,), shape), x.shape[1], Four(*x.stride()))


def rows(x: Tensor, *shape: int) -> RowsArgument:
    """Describe a tensor (batch, heads, tokens, channels), sizes of 1 as spread; the caller keeps it alive."""
    wanted = [1 if have == 1 else want for have, want in zip(x.shape, shape, strict=True)]
    stride = (step if size > 1 else 0 for size, step in zip(x.shape, x.stride(), strict=True))
    return RowsArgument(strided(x, DTYPES, wanted), DTYPES[x.dtype], x.shape[1], Four(*stride))


def stream(x: Tensor | None, *shape: int) -> StreamArgument:
    """Describe a tensor with tokens before channels; the caller keeps it alive."""
    if x is None:
        return StreamArgument()
    return StreamArgument(strided(x, DTYPES, shape), DTYPES[x.dtype], Four(*x.stride()))


def pointer(x: Tensor | None, dtype: torch.dtype, *shape: int) -> int | None:
    """The address of a contiguous tensor's first entry; the caller keeps it alive."""
    if x is None:
        return None
    if not x.is_contiguous():
        raise TypeError(f"a native kernel reads this buffer in order, but its strides are {x.stride()}")
    return strided(x, (dtype,), shape)


def strided(x: Tensor, dtypes: Collection[torch.dtype], shape: Sequence[int]) -> int:
    """The address of a tensor's first entry, once it is known to be memory of these numbers in this shape.

    No address reaches a native kernel but through here (and the short ways of decoding steps, which look for
    themselves): a kernel reads what it is told without a question. Not an assertion, which ``python -O`` leaves out.
    """
    if x.device.type != "cpu" or x.layout is not torch.strided or x.is_neg():
        raise TypeError(f"a native kernel reads plain memory on a CPU, not a {x.layout} tensor on {x.device}")
    if x.dtype not in dtypes or x.shape != tuple(shape):
        wanted = f"{' or '.join(map(str, dtypes))} {tuple(shape)}"
        raise TypeError(f"a native kernel was to read {wanted}, but was given {x.dtype} {tuple(x.shape)}")
    address = x.data_ptr()
    if x.numel() and (not address or x.untyped_storage().nbytes() < _last_byte(x)):
        raise ValueError(f"a tensor {tuple(x.shape)} has lost its memory: its storage was freed or made smaller")
    if address % x.element_size():
        raise ValueError(f"a tensor is not aligned in memory to its numbers of {x.element_size()} bytes")
    return address


def misaligned(x: Tensor) -> bool:
    """Whether a tensor's memory begins between its numbers, which kernels cannot read; of plain ones only."""
    return not torch.compiler.is_compiling() and is_plain(x) and x.data_ptr() % x.element_size() != 0


def _last_byte(x: Tensor) -> int:
    entries = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return int((x.storage_offset() + entries) * x.element_size())


def check(status: int) -> None:
    """Raise what a kernel reports."""
    if status == REFUSED:
        raise RuntimeError("a native kernel was given a description that no tensors have: please report this call")
    if status:
        raise MemoryError("a native kernel could not allocate its working memory")


def kernels(name: str, *arguments: type[Structure]) -> ctypes.CDLL:
    """The library, with the types of a family's entry points ``foveate_{name}_forward`` and ``..._backward``."""
    found = library()
    assert found is not None, "refuse() lets no call through without a library"
    return _declared(found, name, *arguments)


@cache
def _declared(found: ctypes.CDLL, name: str, *arguments: type[Structure]) -> ctypes.CDLL:
    for way in ("forward", "backward"):
        function = getattr(found, f"foveate_{name}_{way}")
        function.argtypes, function.restype = tuple(map(POINTER, arguments)), c_int64
    size = getattr(found, f"foveate_{name}_size")()
    assert size == ctypes.sizeof(arguments[-1]), f"{arguments[-1].__name__} is not what csrc has"
    return found
