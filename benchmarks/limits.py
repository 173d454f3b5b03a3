"""What the machine reaches at best, measured in the same process as what is held against it."""

from __future__ import annotations

import ctypes

import torch

from benchmarks.contest import seconds_of
from foveate.kernels.cpu.loader import library

SECONDS = 0.3  # for each rate
COPIES = 12


def arithmetic(threads: int) -> dict[str, float]:
    """Operations per second of multiply-adds, "float32" and "bfloat16"; empty where no native library is."""
    native = library()
    if native is None:
        return {}
    rates = {}
    for dtype, measure in (("float32", native.foveate_peak_fma), ("bfloat16", native.foveate_peak_bf16)):
        measure.restype, measure.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_double]
        rates[dtype] = measure(threads, SECONDS)
    return rates


def bandwidth(num_bytes: int, threads: int) -> dict[str, float]:
    """Bytes per second over memory of this size: "copy", read and written ones, and "read" with a native library."""
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    rates = {"copy": 2 * num_bytes / min(seconds_of(lambda: (target.copy_(source),)) for _ in range(COPIES))}
    native = library()
    if native is not None:
        measure = native.foveate_peak_read
        measure.restype, measure.argtypes = ctypes.c_double, [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        rates["read"] = max(measure(source.data_ptr(), num_bytes, threads) for _ in range(COPIES))
    return rates
