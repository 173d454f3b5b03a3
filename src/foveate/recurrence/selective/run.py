"""Which implementation computes a scan, and packed sequences for those that know of one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.amp import is_autocast_available

from foveate.options import FORCED
from foveate.recurrence.selective.impl import chunks as scan_chunks
from foveate.recurrence.selective.impl import kernels as scan_kernels
from foveate.recurrence.selective.impl import reference as scan_reference
from foveate.recurrence.selective.inputs import Forms, Inputs, one_by_one

SHORT = 2  # tokens up to which the loop over tokens is faster than chunks

Result = tuple[Tensor, Tensor]
FORMS: dict[str, Forms] = {"reference": scan_reference.FORMS, "chunks": scan_chunks.FORMS}


def run(inputs: Inputs, state: Tensor, lengths: Sequence[int] | None, impl: str) -> Result:
    """Compute out and the state after the last token, or one for each packed sequence."""
    with _no_autocast(state.device.type):
        name = _chosen(inputs, impl)
        if name == "native":
            return scan_kernels.run(inputs, state, lengths)
        return one_by_one(FORMS[name], inputs, state, lengths)


def _chosen(inputs: Inputs, impl: str) -> str:
    name = (FORCED.get() or impl) if impl == "auto" else impl
    if name == "auto":
        if scan_kernels.refuse(inputs) is None:
            return "native"
        return "reference" if inputs.x.shape[1] <= SHORT else "chunks"
    if name not in (*FORMS, "native"):
        raise ValueError(f'impl must be "auto", "reference", "chunks" or "native", got {name!r}')
    reason = scan_kernels.refuse(inputs) if name == "native" else None
    if reason is not None:
        raise NotImplementedError(f'impl="native" cannot run this call: {reason}')
    return name


def _no_autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext()
