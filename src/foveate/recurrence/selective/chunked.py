"""The scans a chunk of tokens at a time: inside it all at once, by doubling, on any device.

Log-decays are added up and only factors in [0, 1] are ever formed, so decays of any strength neither overflow nor
lose digits to cancellation, and factors near 1 are rounded once per doubling in place of once per token.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import conv1d
from torch.utils.checkpoint import checkpoint

from foveate.plain import transformed
from foveate.recurrence.linear.inputs import join
from foveate.recurrence.selective.inputs import (
    ConvInputs,
    Form,
    Forms,
    Inputs,
    Lengths,
    LinearInputs,
    ScanInputs,
    one_by_one,
)

CHUNK = {ScanInputs: 64, LinearInputs: 512}  # tokens: memory grows with them, the number of kernels shrinks


def scan_by_chunk(inputs: ScanInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return out (B, N, C) and the state (B, C, S) after the last token."""
    return _by_chunk(_scan_chunk, inputs, state)


def linear_by_chunk(inputs: LinearInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return out (B, N, C) and the state (B, C) after the last token."""
    return _by_chunk(_linear_chunk, inputs, state)


def conv_by_torch(inputs: ConvInputs, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Return out (B, N, C) and the tail (B, C, W - 1) after the last token."""
    wide, length = inputs.to_accum(), inputs.x.shape[1]
    seen = torch.cat([tail.to(wide.x.dtype), wide.x.mT], 2)  # (B, C, W - 1 + N)
    out = conv1d(seen, wide.weight.unsqueeze(1), groups=wide.x.shape[2]).mT
    return wide.finished(out).to(inputs.x.dtype), seen[:, :, length:].to(inputs.x.dtype)


FORMS: Forms = {ScanInputs: scan_by_chunk, LinearInputs: linear_by_chunk, ConvInputs: conv_by_torch}


def definition(inputs: Inputs, state: Tensor, lengths: Lengths) -> tuple[Tensor, Tensor]:
    """Out and state once more, all of it kept, for gradients of gradients of the kernels."""
    kept: Forms = {
        ScanInputs: partial(_by_chunk, _scan_chunk, keep=True),
        LinearInputs: partial(_by_chunk, _linear_chunk, keep=True),
        ConvInputs: conv_by_torch,
    }
    return one_by_one(kept, inputs, state, lengths)


def states_after(logs: Tensor, added: Tensor, state: Tensor) -> Tensor:
    """The states (B, T, ...) after each of T tokens with these log-decays and what they add, both (B, T, ...)."""
    first = added[:, :1] + torch.exp(logs[:, :1]) * state.unsqueeze(1)
    states = torch.cat([first, added[:, 1:]], 1)
    reach = 1  # each entry holds what its last `reach` tokens add up to, and their log-decay
    while reach < states.shape[1]:
        states = torch.cat([states[:, :reach], states[:, reach:] + torch.exp(logs[:, reach:]) * states[:, :-reach]], 1)
        logs = torch.cat([logs[:, :reach], logs[:, reach:] + logs[:, :-reach]], 1)
        reach *= 2
    return states


def _by_chunk(run: Form, inputs: Inputs, state: Tensor, *, keep: bool = False) -> tuple[Tensor, Tensor]:
    """Chunk after chunk; for the backward pass each keeps its inputs only, and is computed once more."""
    length, chunk = inputs.x.shape[1], CHUNK[type(inputs)]
    sizes = [chunk] * (length // chunk) + [length % chunk] * (length % chunk > 0)
    outs = []
    for piece in inputs.split(sizes):
        if torch.is_grad_enabled() and not (keep or transformed()):  # torch.func knows no checkpoints
            out, state = checkpoint(run, piece, state, use_reentrant=False, preserve_rng_state=False)
        else:
            out, state = run(piece, state)
        outs.append(out)
    return join(outs, 1), state


def _scan_chunk(inputs: ScanInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    wide = inputs.to_accum()
    dt, B, C = wide.steps(), wide.per_channel(wide.B), wide.per_channel(wide.C)
    states = states_after(dt.unsqueeze(-1) * wide.A, (dt * wide.x).unsqueeze(-1) * B, state)
    read = (states.unsqueeze(-2) @ C.unsqueeze(-1)).flatten(-3) if C.shape[2] > 1 else (states @ C.mT).squeeze(-1)
    return wide.finished(read).to(inputs.x.dtype), states[:, -1]


def _linear_chunk(inputs: LinearInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    wide = inputs.to_accum()
    states = states_after(wide.decay, wide.x, state)
    return states.to(inputs.x.dtype), states[:, -1]
