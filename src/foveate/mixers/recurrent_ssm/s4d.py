"""S4D: a diagonal state space in each channel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from foveate.catalogue.registry import register
from foveate.mixers.base import StepOutput
from foveate.mixers.recurrent_ssm.diagonal import ROUNDED, DiagonalSSM, State
from foveate.mixers.stateful import Lengths, StatefulMixer


@register(
    "s4d",
    reference="S4D",
    formula="h_t = exp(Δ A) h_{t-1} + B̄ x_t, y_t = 2 Re(C h_t) + D x_t, out = GLU(W gelu(y))",
    notes="B is 1, as C stands for both. A starts as in S4D-LegS. Padding lies at the ends of a sequence.",
)
class S4D(StatefulMixer):
    """In each channel a diagonal state space, which is a convolution with a filter as long as the sequence.

    ``state`` real numbers are kept a channel; ``method`` of discretisation is "zoh" or "bilinear". ``chunk`` bounds
    the tokens of one transform; None takes in all at once.
    """

    exempt: ClassVar[dict[str, str]] = {"causal gradients": ROUNDED}

    def __init__(
        self, dim: int, *, state: int = 64, method: str = "zoh", chunk: int | None = None, causal: bool = True
    ) -> None:
        super().__init__(dim, causal=causal)
        self.chunk = chunk
        self.ssm = DiagonalSSM(dim, state, method=method)
        self.to_out = nn.Linear(dim, 2 * dim)

    def run(self, x: Tensor, state: State | None, lengths: Lengths, key_mask: Tensor | None) -> StepOutput:
        before = None if state is None else state.numbers
        y, after = self.ssm(x, before, final=state is not None or not x.shape[1], lengths=lengths, chunk=self.chunk)
        out, gate = self.to_out(gelu(y)).chunk(2, dim=-1)
        return StepOutput(out * torch.sigmoid(gate), None if after is None else State(after))
