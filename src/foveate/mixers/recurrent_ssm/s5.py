"""S5: one diagonal state space for all channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from foveate.catalogue.registry import register
from foveate.mixers.base import StepOutput
from foveate.mixers.recurrent_ssm.diagonal import Dynamics, State, as_complex, complex_parameter, halved
from foveate.mixers.stateful import Lengths, StatefulMixer
from foveate.precision import to_accum
from foveate.recurrence.ssm import evolve_shared, hippo_rates


@register(
    "s5",
    reference="S5",
    formula="h_t = exp(Δ A) h_{t-1} + B̄ x_t, y_t = 2 Re(C h_t) + D x_t with one h for all channels, out = g ⊙ σ(W g)",
    notes="g is gelu(y). A starts as the paper's with one block. Padding lies at the ends of a sequence.",
)
class S5(StatefulMixer):
    """One diagonal state space of ``state`` real numbers for all channels together, computed by a parallel scan."""

    def __init__(self, dim: int, *, state: int = 64, method: str = "zoh", causal: bool = True) -> None:
        super().__init__(dim, causal=causal)
        pairs = halved(state)
        self.dynamics = Dynamics(hippo_rates(pairs), steps=pairs, method=method)
        self.write = complex_parameter(pairs, dim, scale=dim**-0.5)
        self.read = complex_parameter(dim, pairs, scale=pairs**-0.5)
        self.D = nn.Parameter(torch.randn(dim))
        self.to_gate = nn.Linear(dim, dim)

    def run(self, x: Tensor, state: State | None, lengths: Lengths, key_mask: Tensor | None) -> StepOutput:
        if lengths is not None:
            pieces = [self.run(piece, None, None, None).out for piece in x.split(list(lengths), dim=1)]
            return StepOutput(torch.cat(pieces, dim=1), None)
        transition, entry = self.dynamics()
        write = entry.unsqueeze(-1) * as_complex(self.write)  # (S, C)
        inputs = to_accum(x).to(write.dtype) @ write.mT  # (B, N, S)
        states, after = evolve_shared(inputs, transition, state=None if state is None else state.numbers)
        g = gelu(2 * (states @ as_complex(self.read).mT).real.to(x.dtype) + self.D * x)
        return StepOutput(g * torch.sigmoid(self.to_gate(g)), State(after))
