"""Exponential input gates without overflow: a state is held in units that grow and shrink with what is in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NOTHING = -1e30  # the log-unit of a state that holds nothing yet
FASTEST = -1e5  # beyond it a fading state's unit stays behind: the sum of float64 logs must keep its digits


class Stabilised(NamedTuple):
    """Decays and input weights for a state in units of exp(unit), and these log-units; the first four as the gates."""

    decay: Tensor  # log-factors of the scaled state, at most 0
    weight: Tensor  # what each input is multiplied by, at most 1 (and a rounding)
    before: Tensor  # log-unit of the state that each token finds
    after: Tensor  # log-unit of the state that it leaves
    last: Tensor  # log-unit of the final state, without the time axis; of packed sequences one each along axis 0


def stabilise(
    decay: Tensor,
    gate: Tensor,
    *,
    dim: int = -1,
    unit: Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> Stabilised:
    """Rewrite S_t = exp(decay_t) S_{t-1} + exp(gate_t) u_t for a state that cannot overflow.

    With units m_t = max(decay_t + m_{t-1}, gate_t), the scaled state s_t = exp(-m_t) S_t obeys
    s_t = exp(decay_t + m_{t-1} - m_t) s_{t-1} + exp(gate_t - m_t) u_t, in which no factor exceeds 1. Any units give
    the same S, so none of them carries a gradient; those of the decays and gates are exact.

    >>> gate = torch.tensor([900.0, 100.0, 1000.0])  # exp(900) is beyond float64
    >>> stable = stabilise(torch.full((3,), -0.5), gate)
    >>> stable.after, stable.weight
    (tensor([ 900.0000,  899.5000, 1000.0000]), tensor([1., 0., 1.]))

    Args:
        decay, gate: logs of one shape, decay at most 0, gate anything (-inf writes nothing); float32 or float64.
        dim: their time axis.
        unit: ``last`` of an earlier call, for sequences handed over in pieces; None where nothing was written yet.
        lengths: of sequences packed along ``dim``; there is then no ``unit``.

    Beck et al., xLSTM, arXiv 2405.04517 (mLSTM); Peng et al., RWKV, 2305.13048.
    """
    if decay.shape != gate.shape:
        raise ValueError(f"decay and gate have one shape; got {tuple(decay.shape)} and {tuple(gate.shape)}")
    if lengths is None:
        return _stabilise(decay, gate, dim, unit)
    if unit is not None:
        raise ValueError("packed sequences each start anew: pass either lengths or unit")
    pieces = zip(decay.split(list(lengths), dim), gate.split(list(lengths), dim), strict=True)
    *along, lasts = zip(*(_stabilise(*piece, dim, None) for piece in pieces), strict=True)
    scaled, weight, before, after = (torch.cat(each, dim) for each in along)
    return Stabilised(scaled, weight, before, after, torch.cat(lasts))


def _stabilise(decay: Tensor, gate: Tensor, dim: int, unit: Tensor | None) -> Stabilised:
    before, after, last = _units(decay.detach(), gate.detach(), dim, unit)
    empty = before <= NOTHING / 2
    scaled = decay.double() + torch.where(empty, 0, before - after)
    scaled = scaled - scaled.detach().clamp(min=0)  # a rounding above 0 is cut off, its gradient is not
    weight = (gate.double() - after).exp()
    before, after, last = (x.to(gate.dtype) for x in (before, after, last))
    return Stabilised(scaled.to(decay.dtype), weight.to(gate.dtype), before, after, last)


def _units(decay: Tensor, gate: Tensor, dim: int, unit: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-units before and after each token and at the end, in float64 but rounded to what ``gate`` can hold."""
    start = torch.full_like(gate.sum(dim), NOTHING) if unit is None else unit
    start = start.double().unsqueeze(dim)
    faded, gates = decay.double().clamp(min=FASTEST).cumsum(dim), gate.double()
    greatest = torch.maximum((gates - faded).cummax(dim).values, start)
    after = torch.maximum(faded + greatest, gates).to(gate.dtype).double()
    units = torch.cat([start, after], dim)
    return units.narrow(dim, 0, gate.shape[dim]), after, units.select(dim, -1)
