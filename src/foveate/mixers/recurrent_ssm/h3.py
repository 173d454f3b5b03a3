"""H3: a shift and a diagonal state space between two gates."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from foveate.catalogue.registry import register
from foveate.mixers.base import StepOutput
from foveate.mixers.recurrent_ssm.diagonal import ROUNDED, DiagonalSSM
from foveate.mixers.stateful import Lengths, StatefulMixer
from foveate.recurrence.selective.api import causal_conv
from foveate.recurrence.ssm import Evolved, linear_rates


class Shifted(NamedTuple):
    """The complex state (B * D * D, H, S / 2) of H3, and the keys (B, C, shift - 1) that it still holds."""

    numbers: Tensor
    tail: Tensor


@register(
    "h3",
    papers=("H3",),
    formula="o = q · SSM_diag(SSM_shift(k) vᵀ), by heads, out = W o",
    notes=(
        "As in the authors' code A starts as in S4D-Lin and is discretised by the trapezoidal rule, and head_dim is 1. "
        "What they keep beside the shift, a factor of the newest key, is part of the shift here. Padding lies at the "
        "ends of a sequence."
    ),
)
class H3(StatefulMixer):
    """Keys of the last tokens, kept by a shift, their products with values by a diagonal state space, read by queries.

    Heads have ``head_dim`` channels; ``shift`` is how many keys the shift holds, ``state`` the real numbers kept
    for each product of a key's and a value's channel. ``chunk`` bounds the tokens of one transform, the state
    passing on; None takes in all at once.
    """

    exempt: ClassVar[dict[str, str]] = {"causal gradients": ROUNDED}

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 1,
        state: int = 64,
        shift: int = 64,
        chunk: int | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__(dim, causal=causal)
        if head_dim < 1 or dim % head_dim:
            raise ValueError(f"head_dim must divide dim: {dim} / {head_dim} is not whole")
        if shift < 1:
            raise ValueError(f"the shift holds at least the newest key; got shift={shift}")
        self.head_dim, self.heads, self.chunk = head_dim, dim // head_dim, chunk
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))
        taps = torch.empty(dim, shift).uniform_(-(shift**-0.5), shift**-0.5)
        taps[:, -1] += torch.randn(dim)
        self.shift = nn.Parameter(taps)  # what is read of the last keys, newest last
        self.ssm = DiagonalSSM(self.heads, state, method="bilinear", rates=linear_rates)

    def run(self, x: Tensor, state: Shifted | None, lengths: Lengths, key_mask: Tensor | None) -> StepOutput:
        batch, length, _ = x.shape
        before, tail = (None, None) if state is None else state
        k, v = self.to_k(x), self.to_v(x)
        if key_mask is not None:  # biases are no tokens
            k, v = (each.masked_fill(~key_mask.unsqueeze(-1), 0) for each in (k, v))
        k, tail = causal_conv(k, self.shift, tail=tail, lengths=lengths)
        q, k, v = (each.unflatten(-1, (self.heads, self.head_dim)) for each in (self.to_q(x), k, v))
        products = k.unsqueeze(-1) * v.unsqueeze(-2)  # (B, N, H, D, D)
        folded = products.permute(0, 3, 4, 1, 2).flatten(0, 2)  # (B * D * D, N, H)
        o, after = self.evolved(folded, before, state is not None, lengths)
        o = o.view(batch, self.head_dim, self.head_dim, length, self.heads).permute(0, 3, 4, 1, 2)
        out = self.to_out((q.unsqueeze(-2) @ o).flatten(2))
        return StepOutput(out, None if after is None else Shifted(after, tail))

    def evolved(self, folded: Tensor, before: Tensor | None, final: bool, lengths: Lengths) -> Evolved:
        """The state space over products (B * D * D, N, H), or over each document of them."""
        if lengths is None:
            return self.ssm(folded, before, final=final, chunk=self.chunk)
        pieces = [self.ssm(piece, final=False, chunk=self.chunk).out for piece in folded.split(list(lengths), dim=1)]
        return Evolved(torch.cat(pieces, dim=1), None)

    def empty_state(self, batch: int, capacity: int | None) -> Shifted:
        state = self.ssm.init_state(batch * self.head_dim**2)
        return Shifted(state, self.shift.new_zeros(batch, self.dim, self.shift.shape[1] - 1))
