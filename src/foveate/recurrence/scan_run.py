"""Which implementation computes a scan, and packed sequences for those that know of one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.amp import is_autocast_available

from foveate.options import FORCED
from foveate.recurrence import scan_chunks, scan_kernels, scan_reference
from foveate.recurrence.layout import join
from foveate.recurrence.scan_inputs import Form, Forms, Inputs

SHORT = 2  # tokens up to which the loop over tokens is faster than chunks

Result = tuple[Tensor, Tensor]
FORMS: dict[str, Forms] = {"reference": scan_reference.FORMS, "chunks": scan_chunks.FORMS}


def run(inputs: Inputs, state: Tensor, lengths: Sequence[int] | None, impl: str) -> Result:
    """Compute out and the state after the last token, or one for each packed sequence."""
    with _no_autocast(state.device.type):
        name = _chosen(inputs, impl)
        if name == "native":
            return scan_kernels.run(inputs, state, lengths)
        if lengths is None:
            return _run(FORMS[name][type(inputs)], inputs, state)
        pieces = zip(inputs.split(lengths), state.split(1), strict=True)
        results = (_run(FORMS[name][type(inputs)], piece, piece_state) for piece, piece_state in pieces)
        outs, states = zip(*results, strict=True)
        return join(outs, 1), join(states, 0)


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


def _run(form: Form, inputs: Any, state: Tensor) -> Result:
    return form(inputs, state) if inputs.x.shape[1] else (inputs.x.clone(), state)


def _no_autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext()
