"""A parallel scan: in each of log2 N passes, every token takes over what the one so many before it holds."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.dispatch import Facts, Implementation, as_it_is, nothing
from foveate.recurrence.ssm.inputs import SharedCall, short
from foveate.recurrence.ssm.response import powers


def defer(call: SharedCall) -> str | None:
    """Why the loop over tokens is the better form; None where it is not."""
    return short(1, call.u.shape[1])


def run(call: SharedCall) -> tuple[Tensor, Tensor]:
    """States (B, N, S), and the last of them."""
    u, transition, state = call
    first = u[:, :1] + (transition.exp() * state).unsqueeze(1)
    h, reach = torch.cat([first, u[:, 1:]], dim=1), 1
    while reach < u.shape[1]:  # h_t holds the last ``reach`` inputs
        carried = powers(transition, reach) * h[:, :-reach]
        h = torch.cat([h[:, :reach], h[:, reach:] + carried], dim=1)
        reach *= 2
    return h, h[:, -1]


def _facts(call: SharedCall) -> Facts:
    return {"tokens": call.u.shape[1], "passes": max(0, call.u.shape[1] - 1).bit_length()}


DOUBLING = Implementation("doubling", nothing, as_it_is, run, defer, _facts)
