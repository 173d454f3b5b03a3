"""The kernels' C structures (csrc/abi.h), and how tensors are described to them."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KINDS = {"softmax": 0, "sigmoid": 1, "relu": 2}
DENSE, ALIBI, RELATIVE = 0, 1, 2
OUT_OF_RANGE = 2  # what a kernel returns that meets a number it does not take

Four = c_int64 * 4


class TensorArgument(Structure):
    """(batch, heads, tokens, channels) of any strides."""

    _fields_ = (("data", c_void_p), ("heads", c_int64), ("stride", Four))


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


def tensor(x: Tensor) -> TensorArgument:
    """Describe a tensor (batch, heads, tokens, channels); the caller keeps it alive."""
    return TensorArgument(x.data_ptr(), x.shape[1], Four(*x.stride()))


def pointer(x: Tensor | None) -> int | None:
    """The address of a contiguous tensor's first entry."""
    assert x is None or x.is_contiguous()
    return None if x is None else x.data_ptr()


def check(status: int) -> None:
    """Raise what a kernel reports."""
    if status:
        raise MemoryError("a native kernel could not allocate its working memory")


@lru_cache(maxsize=1)
def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, with the types of its entry points."""
    for name in ("foveate_attend_forward", "foveate_attend_backward"):
        function = getattr(library, name)
        function.argtypes, function.restype = (POINTER(AttendArgument),), c_int64
    assert library.foveate_attend_size() == ctypes.sizeof(AttendArgument), "csrc/abi.h and call.py differ"
    return library
