"""The definitions of the scans: one token after another, in loops that read like the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.dispatch import Implementation, as_it_is, nothing
from foveate.recurrence.selective.inputs import (
    Call,
    ConvInputs,
    Forms,
    LinearInputs,
    ScanInputs,
    one_by_one,
    state_facts,
)


def scan_by_token(inputs: ScanInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return out (B, N, C) and the state (B, C, S) after the last token."""
    wide = inputs.to_accum()
    dt, B, C = wide.steps(), wide.per_channel(wide.B), wide.per_channel(wide.C)
    outs = []
    for t in range(dt.shape[1]):
        kept = torch.exp(dt[:, t, :, None] * wide.A) * state
        state = kept + (dt[:, t] * wide.x[:, t]).unsqueeze(-1) * B[:, t]
        outs.append((C[:, t] * state).sum(-1))
    return wide.finished(torch.stack(outs, 1)).to(inputs.x.dtype), state


def linear_by_token(inputs: LinearInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return out (B, N, C) and the state (B, C) after the last token."""
    wide = inputs.to_accum()
    outs = []
    for x, decay in zip(wide.x.unbind(1), wide.decay.unbind(1), strict=True):
        state = torch.exp(decay) * state + x
        outs.append(state)
    return torch.stack(outs, 1).to(inputs.x.dtype), state


def conv_by_tap(inputs: ConvInputs, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Return out (B, N, C) and the tail (B, C, W - 1) after the last token."""
    wide, length = inputs.to_accum(), inputs.x.shape[1]
    seen = torch.cat([tail.mT.to(wide.x.dtype), wide.x], 1)  # (B, W - 1 + N, C)
    taps = wide.weight.unbind(1)
    out = sum((seen[:, i : i + length] * tap for i, tap in enumerate(taps)), torch.zeros_like(wide.x))
    out = wide.finished(out).to(inputs.x.dtype)
    return out, seen[:, length:].mT.to(inputs.x.dtype)


FORMS: Forms = {ScanInputs: scan_by_token, LinearInputs: linear_by_token, ConvInputs: conv_by_tap}


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Out (B, N, C) and the state after the last token, or one for each packed sequence."""
    return one_by_one(FORMS, *call)


REFERENCE = Implementation("reference", nothing, as_it_is, run, facts=state_facts)
