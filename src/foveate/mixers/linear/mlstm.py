"""The matrix LSTM: linear attention with exponential input gates, and a state that they cannot overflow."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, logsigmoid, pad

from foveate.catalogue.registry import register
from foveate.mixers.base import StepOutput, join_heads
from foveate.mixers.recurrent import Inputs, Lengths, RecurOptions, RecurrentMixer, RecurrentState
from foveate.precision import to_accum
from foveate.recurrence.linear.stabilise import Stabilised, stabilise

LEAST = 1e-6  # of a unit: a query of zeros divides by it, and keeps a finite gradient


@register(
    "mlstm",
    reference="xLSTM",
    formula="C_t = f_t C_{t-1} + e^i_t k_t v_tᵀ, n_t = f_t n_{t-1} + e^i_t k_t, h_t = q_tᵀ C_t / max(|q_tᵀ n_t|, 1)",
    notes=(
        "The layer of the xLSTM paper without the block around it: sigmoid forget gates, a layer norm of each head, a "
        "sigmoid output gate. conv puts short convolutions before queries, keys and values."
    ),
)
class MLSTM(RecurrentMixer):
    """A matrix-valued state with a forget gate and an exponential input gate per head, divided by its normaliser.

    Inputs and state are held in units of exp(m_t), m_t = max(log f_t + m_{t-1}, i_t), the paper's stabiliser.
    """

    def __init__(self, dim: int, heads: int = 8, **options: Unpack[RecurOptions]) -> None:
        super().__init__(dim, heads, **options)
        self.to_input, self.to_forget = nn.Linear(dim, self.kv_heads), nn.Linear(dim, self.kv_heads)
        self.to_gate = nn.Linear(dim, heads * self.value_dim)
        self.gain = nn.Parameter(torch.ones(heads * self.value_dim))
        with torch.no_grad():  # keep much and write little at first, as the authors' code does
            self.to_input.bias.fill_(-10.0)
            self.to_forget.bias.copy_(torch.linspace(3, 6, self.kv_heads))

    def flow(
        self, x: Tensor, context: Tensor, state: Any = None, lengths: Lengths = None, padding: Tensor | None = None
    ) -> StepOutput:
        before, (*tails, unit) = (None, (None,)) if state is None else state
        q, k, v, after = self.project(x, context, tuple(tails), lengths)
        gates = self.gates(x, padding, unit, lengths)
        k, v = to_accum(k) * gates.weight.unsqueeze(-1), pad(to_accum(v), (0, 1), value=1.0)
        heads, recurrent = self.run(Inputs(q, k, v, decay=gates.decay), lengths=lengths, state=before)
        out = self.read_out(x, normalised(heads, gates.after))
        return StepOutput(out, RecurrentState(recurrent, (*after, gates.last)))

    def gates(self, x: Tensor, padding: Tensor | None, unit: Tensor | None, lengths: Lengths) -> Stabilised:
        """Decays and input weights, (B, G, N); padding neither decays the state nor writes to it."""
        decay, gate = logsigmoid(to_accum(self.to_forget(x))), to_accum(self.to_input(x))
        if padding is not None:
            hidden = ~padding.unsqueeze(-1)
            decay, gate = decay.masked_fill(hidden, 0), gate.masked_fill(hidden, -torch.inf)
        return stabilise(decay.transpose(1, 2), gate.transpose(1, 2), unit=unit, lengths=lengths)

    def read_out(self, x: Tensor, heads: Tensor) -> Tensor:
        normed = join_heads(layer_norm(heads, heads.shape[-1:])) * self.gain
        return self.to_out(normed.to(x.dtype) * torch.sigmoid(self.to_gate(x)))


def normalised(heads: Tensor, unit: Tensor) -> Tensor:
    """What a state in units of exp(unit) (B, G, N) says, (B, H, N, Dv), from heads with q^T n as their last channel."""
    total, weight = heads[..., :-1], heads[..., -1:]
    unit = unit.repeat_interleave(heads.shape[1] // unit.shape[1], dim=1).unsqueeze(-1)
    return total / torch.maximum(weight.abs(), (-unit).exp()).clamp(min=LEAST)
