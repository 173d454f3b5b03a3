"""Chunk-parallel form: dense products inside chunks, a short loop carrying the state between them.

It follows Lightning Attention-2 (Qin et al., 2401.04658) and GLA (Yang et al., 2312.06635). What happens
inside a chunk is in `fold.py`, and for the delta rule in `delta.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.recurrence.linear.chunked.delta import Corrected, correct
from foveate.recurrence.linear.chunked.fold import fold
from foveate.recurrence.linear.chunked.low_rank import recur_low_rank
from foveate.recurrence.linear.inputs import Grouped, LowRank, Tokens, join

SPAN = 1024  # tokens whose chunks are computed together: bounds memory, and keeps it in a CPU's cache


def recur_by_chunk(tokens: Tokens, state: Tensor, *, causal: bool, chunk: int) -> tuple[Tensor, Tensor]:
    """Return out (B, H, N, Dv) and the state (B, S, D, Dv) after the last token."""
    if not causal:
        return _read_total(tokens, state)
    outs = []
    for stretch in tokens.split(list(_stretches(tokens.q.size(2), chunk))):
        out, state = _recur_stretch(stretch, state, chunk)
        outs.append(out.flatten(1, 2).to(tokens.v.dtype))
    return join(outs, 2), state


def _read_total(tokens: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    for k, v in zip(tokens.k.split(SPAN, 2), tokens.v.split(SPAN, 2), strict=True):
        state = state + tokens.per_state(k).mT @ tokens.per_state(v)
    out = torch.einsum("bsrnd,bsdv->bsrnv", tokens.queries(), state)
    return out.flatten(1, 2).to(tokens.v.dtype), state


def _stretches(length: int, chunk: int) -> Iterator[int]:
    """Lengths of whole chunks, at most SPAN tokens or one chunk each, and then of what is left over."""
    span = max(SPAN, chunk)
    while length >= chunk:
        whole = min(length - length % chunk, span)
        yield whole
        length -= whole
    if length:
        yield length


def _recur_stretch(tokens: Tokens, state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    length = tokens.q.size(2)
    if length < chunk:
        chunk = 1 << (length - 1).bit_length()
    out, state = _recur_chunks(_chunked(tokens.grouped(), length, chunk), state)
    return out.flatten(3, 4)[:, :, :, :length], state


def _chunked(inputs: Grouped, length: int, chunk: int) -> Grouped:
    """Cut the time axis into (chunks, C), padding with tokens that leave the state alone."""
    decay = inputs.decay
    if decay.size(2) == 1:
        decay = decay.expand(-1, -1, min(length, chunk), -1)
    q, k, v, decay = (_cut(x, chunk) for x in (inputs.q, inputs.k, inputs.v, decay))
    beta = None if inputs.beta is None else _cut(inputs.beta, chunk)
    low_rank = None if inputs.low_rank is None else LowRank(*(_cut(x, chunk) for x in inputs.low_rank))
    bonus = inputs.bonus
    if bonus is not None:
        bonus = bonus.unsqueeze(-3) if bonus.size(-2) == 1 else _cut(bonus, chunk)
    return Grouped(q, k, v, decay, beta, low_rank, bonus)


def _cut(x: Tensor, chunk: int) -> Tensor:
    missing = -x.size(-2) % chunk
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x
    return padded.unflatten(-2, (-1, chunk))


def _recur_chunks(inputs: Grouped, state: Tensor) -> tuple[Tensor, Tensor]:
    """inputs are cut into chunks: q (B, S, R, chunks, C, D), k (B, S, chunks, C, D), ..."""
    q, k, v, decay, beta, low_rank, bonus = inputs
    if beta is None:
        own = None if bonus is None else (q * bonus * k.unsqueeze(2)).sum(-1, keepdim=True)
        folded = fold(q, k, decay.exp(), own=own)
        if low_rank is not None:
            return recur_low_rank(inputs, folded, state)
        entering, state = _carry(folded.factor.mT, folded.columns.mT @ v, state)
    else:
        folded, corrected = correct(inputs)
        entering, state = _carry_corrected(corrected, state)
        v = corrected.values - corrected.reads @ entering
    out = torch.einsum("bsrnij,bsnjv->bsrniv", folded.products, v)
    return out + torch.einsum("bsrnid,bsndv->bsrniv", folded.rows, entering), state


def _carry(factor: Tensor, update: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states entering each chunk (B, S, chunks, D, Dv), and the one leaving the last."""
    entering = []
    factor = factor.expand(-1, -1, update.size(2), -1, -1)
    for factor_c, update_c in zip(factor.unbind(2), update.unbind(2), strict=True):
        entering.append(state)
        state = torch.addcmul(update_c, factor_c, state)
    return torch.stack(entering, 2), state


def _carry_corrected(corrected: Corrected, state: Tensor) -> tuple[Tensor, Tensor]:
    entering = []
    for transition, update in zip(corrected.transition.unbind(2), corrected.update.unbind(2), strict=True):
        entering.append(state)
        state = update + transition @ state
    return torch.stack(entering, 2), state
