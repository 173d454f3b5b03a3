"""In which dtype numbers are added up: at least float32, whatever they come in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.amp import is_autocast_available


def accum_dtype(*given: Tensor | torch.dtype) -> torch.dtype:
    """The dtype to compute in: the widest of those given, themselves or as a tensor's, and float32 at least.

    >>> accum_dtype(torch.bfloat16, torch.float16), accum_dtype(torch.float16, torch.float64)
    (torch.float32, torch.float64)
    """
    found = torch.float32
    for x in given:
        dtype = x.dtype if isinstance(x, Tensor) else x
        if dtype is not found:
            found = torch.promote_types(found, dtype)
    return found


def to_accum(x: Tensor) -> Tensor:
    """The tensor in the dtype to compute in.

    >>> to_accum(torch.ones(2, dtype=torch.float16)).dtype
    torch.float32
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(device: str) -> AbstractContextManager[None]:
    """Inside, products keep the dtype of their factors, also where the caller has switched autocast on.

    >>> with torch.autocast("cpu", torch.bfloat16), no_autocast("cpu"):
    ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
    torch.float32
    """
    if not is_autocast_available(device):
        return nullcontext()
    switched_on = torch.compiler.is_compiling() or torch.is_autocast_enabled(device)  # to switch off takes microseconds
    return torch.autocast(device, enabled=False) if switched_on else nullcontext()
