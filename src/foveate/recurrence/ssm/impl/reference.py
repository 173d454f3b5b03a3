"""The definitions: one token after another, in loops that read like the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.dispatch import Facts, Implementation, as_it_is, nothing
from foveate.recurrence.ssm.inputs import Call, SharedCall, by_chunk


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    """Out (B, N, C) and the state after the last token."""
    return by_chunk(_token_by_token, call)


def _token_by_token(
    x: Tensor, transition: Tensor, write: Tensor, read: Tensor, state: Tensor | None, final: bool
) -> tuple[Tensor, Tensor]:
    h = transition.new_zeros(x.shape[0], *transition.shape) if state is None else state
    kept, outs = transition.exp(), []
    for token in x.unbind(1):
        h = kept * h + write * token.unsqueeze(-1)
        outs.append(2 * (read * h).sum(-1).real)
    return torch.stack(outs, dim=1) if outs else x, h


def run_shared(call: SharedCall) -> tuple[Tensor, Tensor]:
    """States (B, N, S), and the last of them."""
    u, transition, state = call
    states = []
    for token in u.unbind(1):
        state = transition.exp() * state + token
        states.append(state)
    return torch.stack(states, dim=1), state


def _facts(call: Call) -> Facts:
    return {"tokens": call.x.shape[1]}


def _shared_facts(call: SharedCall) -> Facts:
    return {"tokens": call.u.shape[1]}


REFERENCE = Implementation("reference", nothing, as_it_is, run, facts=_facts)
SHARED_REFERENCE = Implementation("reference", nothing, as_it_is, run_shared, facts=_shared_facts)
