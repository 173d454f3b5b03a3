"""Which implementation computes a scan, and packed sequences for those that know of one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.amp import is_autocast_available

from foveate.options import FORCED
from foveate.recurrence import scan_chunks, scan_reference
from foveate.recurrence.layout import join
from foveate.recurrence.scan_inputs import Form, Forms, Inputs

SHORT = 2  # tokens up to which the loop over tokens is faster than chunks

Result = tuple[Tensor, Tensor]
FORMS: dict[str, Forms] = {"reference": scan_reference.FORMS, "chunks": scan_chunks.FORMS}


def run(inputs: Inputs, state: Tensor, lengths: Sequence[int] | None, impl: str) -> Result:
    """Compute out and the state after the last token, or one for each packed sequence."""
    name = (FORCED.get() or impl) if impl == "auto" else impl
    if name == "auto":
        name = "reference" if inputs.x.shape[1] <= SHORT else "chunks"
    if name not in FORMS:
        raise ValueError(f'impl must be "auto", "reference" or "chunks", got {name!r}')
    form = FORMS[name][type(inputs)]
    with _no_autocast(state.device.type):
        if lengths is None:
            return _run(form, inputs, state)
        pieces = zip(inputs.split(lengths), state.split(1), strict=True)
        outs, states = zip(*(_run(form, piece, piece_state) for piece, piece_state in pieces), strict=True)
        return join(outs, 1), join(states, 0)


def _run(form: Form, inputs: Any, state: Tensor) -> Result:
    return form(inputs, state) if inputs.x.shape[1] else (inputs.x.new_zeros(inputs.x.shape), state)


def _no_autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext()
