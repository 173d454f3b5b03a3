"""The definition: one token after another, in a loop that reads like the formula."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.recurrence.layout import Grouped, Tokens


def recur_by_token(tokens: Tokens, state: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Return out (B, H, N, Dv) and the state (B, S, D, Dv) after the last token."""
    inputs = tokens.grouped()
    outs = []
    for t in range(inputs.k.size(2)):
        state = _update(inputs, t, state)
        if causal:
            outs.append(_read(inputs.q[:, :, :, t : t + 1], state))
    out = torch.cat(outs, dim=3) if causal else _read(inputs.q, state)
    return out.flatten(1, 2).to(tokens.v.dtype), state


def _update(inputs: Grouped, t: int, state: Tensor) -> Tensor:
    k, v = inputs.k[:, :, t], inputs.v[:, :, t]
    decay = inputs.decay[:, :, t if inputs.decay.size(2) > 1 else 0]
    state = torch.exp(decay).unsqueeze(-1) * state
    if inputs.beta is not None:
        remembered = torch.einsum("bsd,bsdv->bsv", k, state)
        v = inputs.beta[:, :, t] * (v - remembered)
    return state + k.unsqueeze(-1) * v.unsqueeze(-2)


def _read(q: Tensor, state: Tensor) -> Tensor:
    return torch.einsum("bsrnd,bsdv->bsrnv", q, state)
