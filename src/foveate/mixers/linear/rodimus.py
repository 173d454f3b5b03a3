"""Rodimus: linear attention whose input gate is tied to its decay by a temperature."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, silu, softplus

from foveate.catalogue.registry import register
from foveate.layers.decay import dt_linear
from foveate.layers.short_conv import ShortConv
from foveate.mixers.base import StepOutput, divided, join_heads, split_heads
from foveate.mixers.recurrent import Inputs, Lengths, RecurrentMixer, RecurrentState
from foveate.precision import to_accum

TINY = 1e-30  # a gate closed further would have an infinite root's slope


class RodimusOptions(TypedDict, total=False):
    """What :class:`Rodimus` takes beside the width, the number of heads and causality."""

    memory: int
    expand: int
    rank: int | None
    conv: int


@register(
    "rodimus",
    papers=("Rodimus / Rodimus+",),
    formula="S_t = Diag(exp(-g_t τ_t)) S_{t-1} + (g_t^τ_t ⊙ k_t) u_tᵀ, g_t = softplus(W x_t), τ_t = σ(W' x_t)",
    notes=(
        "Around it stands the authors' block: widened tokens, one short convolution, a low-rank input gate, a residual "
        "and a norm after the gate. Gates start as in their code: g log-uniform in [0.001, 0.1], τ uniform in "
        "[1/16, 0.9]. Padding lies at the ends of a sequence: inside it, the convolution would read it "
        "as zeros."
    ),
)
class Rodimus(RecurrentMixer):
    """Linear attention with tempered selection: one gate, under a temperature, is decay and input gate.

    Tokens are widened ``expand`` times; each of the ``heads`` (one, in the paper) has ``memory`` key channels.
    """

    usual_supports = RecurrentMixer.usual_supports - {"gqa"}

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        memory: int = 64,
        expand: int = 2,
        rank: int | None = None,
        conv: int = 4,
        causal: bool = True,
    ) -> None:
        width = expand * dim
        super().__init__(dim, heads, head_dim=memory, value_dim=divided(width, heads), causal=causal)
        self.to_inner, self.to_gate = (nn.Linear(dim, width, bias=False) for _ in range(2))
        self.conv = ShortConv(width, conv, bias=True)
        self.to_q, self.to_k = (nn.Linear(width, heads * memory, bias=False) for _ in range(2))
        self.to_fading, self.to_tempering = dt_linear(width, heads * memory), nn.Linear(width, heads * memory)
        with torch.no_grad():
            self.to_tempering.bias.uniform_(1 / 16, 0.9).logit_()
        rank = rank or max(dim // 64, 16)
        self.to_rank, self.to_v = nn.Linear(width, rank, bias=False), nn.Linear(rank, width)
        self.residual = nn.Parameter(torch.ones(width))
        self.norm = nn.RMSNorm(width, eps=1e-5)

    def flow(
        self, x: Tensor, context: Tensor, state: Any = None, lengths: Lengths = None, padding: Tensor | None = None
    ) -> StepOutput:
        inner = self.to_inner(x)
        convolved, tail = self.conv(inner, None if state is None else state.tails[0], lengths)
        mixed = silu(convolved)
        inputs = self.selected(inner, mixed)
        if padding is not None:
            inputs = inputs.mask_padding(padding)
        heads, recurrent = self.run(inputs, lengths=lengths, state=None if state is None else state.recurrent)
        out = self.norm((join_heads(heads) + self.residual * mixed) * silu(self.to_gate(x)))
        return StepOutput(self.to_out(out), RecurrentState(recurrent, (tail,)))

    def selected(self, inner: Tensor, mixed: Tensor) -> Inputs:
        """The recurrence's inputs from widened tokens (B, N, W) before and after the convolution."""
        layers = (self.to_q, self.to_k, self.to_fading, self.to_tempering)
        q, k, fading, tempering = (split_heads(layer(mixed), self.heads) for layer in layers)
        gate, temper = softplus(to_accum(fading)), torch.sigmoid(to_accum(tempering))
        key = normalize(to_accum(k), dim=-1) * gate.clamp(min=TINY) ** temper
        value = torch.sigmoid(self.to_v(self.to_rank(inner))) * inner
        return Inputs(q, key, split_heads(value, self.heads), decay=-gate * temper)
