"""The definition: one token after another, in a loop that reads like the formula."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from foveate.dispatch import Facts, Implementation, nothing
from foveate.recurrence.linear.checks import check_ranges_of
from foveate.recurrence.linear.inputs import Call, Grouped, Tokens, one_by_one, state_facts


def plan(call: Call) -> Call:
    """Everything is as the call says, once its gates are known to be in range."""
    check_ranges_of(call.tokens)
    return call


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Out (B, H, N, Dv) and the state (B, S, D, Dv) after the last token."""
    return one_by_one(partial(recur_by_token, causal=call.causal), call.tokens, call.state, call.lengths)


def recur_by_token(tokens: Tokens, state: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Return out (B, H, N, Dv) and the state (B, S, D, Dv) after the last token."""
    inputs = tokens.grouped()
    outs = []
    for t in range(inputs.k.size(2)):
        before, state = state, _update(inputs, t, state)
        if causal:
            outs.append(_read(inputs, t, state) if inputs.bonus is None else _read_with_bonus(inputs, t, before))
    out = torch.cat(outs, dim=3) if causal else torch.einsum("bsrnd,bsdv->bsrnv", inputs.q, state)
    return out.flatten(1, 2).to(tokens.v.dtype), state


def _update(inputs: Grouped, t: int, state: Tensor) -> Tensor:
    k, v = inputs.k[:, :, t], inputs.v[:, :, t]
    decay = inputs.decay[:, :, t if inputs.decay.size(2) > 1 else 0]
    faded = torch.exp(decay).unsqueeze(-1) * state
    if inputs.beta is not None:
        v = inputs.beta[:, :, t] * (v - recalled(k, faded))
    if inputs.low_rank is not None:
        a, b = (x[:, :, t] for x in inputs.low_rank)
        faded = faded + outer(b, recalled(a, state))
    return faded + outer(k, v)


def _read(inputs: Grouped, t: int, state: Tensor) -> Tensor:
    return torch.einsum("bsrnd,bsdv->bsrnv", inputs.q[:, :, :, t : t + 1], state)


def _read_with_bonus(inputs: Grouped, t: int, before: Tensor) -> Tensor:
    assert inputs.bonus is not None
    k, v = inputs.k[:, :, None, t], inputs.v[:, :, None, t]
    bonus = inputs.bonus[:, :, :, t if inputs.bonus.size(3) > 1 else 0]
    weight = (inputs.q[:, :, :, t] * bonus * k).sum(-1, keepdim=True)
    return _read(inputs, t, before) + (weight * v).unsqueeze(3)


def recalled(key: Tensor, state: Tensor) -> Tensor:
    """key^T S, (B, S, Dv)."""
    return torch.einsum("bsd,bsdv->bsv", key, state)


def outer(key: Tensor, value: Tensor) -> Tensor:
    return key.unsqueeze(-1) * value.unsqueeze(-2)


def _facts(call: Call) -> Facts:
    return {"tokens": call.tokens.k.size(2), **state_facts(call)}


REFERENCE = Implementation("reference", nothing, plan, run, facts=_facts)
