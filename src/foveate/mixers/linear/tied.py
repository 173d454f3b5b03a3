"""Linear attention whose keys are what its gate lets go: what a channel forgets and what it takes in are tied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, logsigmoid, normalize, silu, softplus

from foveate.catalogue.registry import Reference, register
from foveate.layers.short_conv import ShortConv
from foveate.mixers.base import StepOutput, divided, join_heads, split_heads
from foveate.mixers.linear.gated import small_steps
from foveate.mixers.recurrent import Inputs, Lengths, RecurrentMixer, RecurrentState
from foveate.precision import to_accum
from foveate.recurrence import Recurrent

TINY = 1e-30  # a gate closed further would have an infinite root's slope


@register(
    "hgrn2",
    papers=None,
    reference=Reference(
        "Qin, Yang, Sun, Shen, Li, Sun, Zhong", "HGRN2: Gated Linear RNNs with State Expansion", "2404.07904"
    ),
    family="linear",
    formula="S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_tᵀ, f_t = b + (1 - b) σ(W x_t), o_t = silu(q_t)ᵀ S_t",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    notes="lower is b, the least forget gate; the paper learns one per layer, growing with depth from 0.",
)
class HGRN2(RecurrentMixer):
    """A gated linear RNN whose state is expanded: outer products of what each channel forgets with the input.

    >>> mixer = HGRN2(64, heads=4, lower=0.5)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    def __init__(self, dim: int, heads: int = 8, *, lower: float = 0.0, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        if not 0 <= lower < 1:
            raise ValueError(f"lower is the least forget gate, from 0 to below 1; got {lower}")
        self.lower = lower
        self.norm = nn.RMSNorm(heads * self.value_dim, eps=1e-5)

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        logits = to_accum(k)
        key = (1 - self.lower) * torch.sigmoid(-logits)  # 1 - f, without cancelling
        decay = torch.log1p(-key) if self.lower else logsigmoid(logits)
        return Inputs(silu(q), key, v, decay=decay, scale=1.0)

    def read_out(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.to_out(self.norm(join_heads(heads)))


@register(
    "metala",
    papers=None,
    reference=Reference(
        "Chou, Yao, Wang, Pan, Zhu, Zhong, Qiao, Wu, Xu, Li",
        "MetaLA: Unified Optimal Linear Approximation to Softmax Attention Map",
        "2411.10741",
    ),
    family="linear",
    formula="S_t = Diag(α_t) S_{t-1} + k_t v_tᵀ, k_t = 1 - α_t, o_t = q_tᵀ S_t + σ(q_tᵀ(w ⊙ k_t) v_t)",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    notes=(
        "alpha_t = sigmoid(W x_t)^(1/16), the sigmoid around the whole of the token's own part, the norm and the gate "
        "are those of the authors' code. Padding lies at the ends of a sequence: inside it, the short convolution "
        "would read it as zeros."
    ),
)
class MetaLA(RecurrentMixer):
    """Linear attention without keys: the decay alone says what is taken in, and a token may stress itself.

    Tokens pass one short convolution; keys are half as wide as values, as in the paper.

    >>> mixer = MetaLA(64, heads=4)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        conv: int = 4,
        temperature: float = 16.0,
        causal: bool = True,
    ) -> None:
        value_dim = value_dim or divided(dim, heads)
        widths = {"head_dim": head_dim or max(1, value_dim // 2), "value_dim": value_dim}
        super().__init__(dim, heads, kv_heads=kv_heads, causal=causal, **widths)
        if not temperature > 0:
            raise ValueError(f"temperature is positive, 16 in the paper; got {temperature}")
        self.temperature = temperature
        self.conv = ShortConv(dim, conv)
        self.to_gate = nn.Linear(dim, heads * value_dim)
        self.stress = nn.Parameter(torch.zeros(heads, self.head_dim))

    def flow(
        self,
        x: Tensor,
        context: Tensor,
        state: RecurrentState | None = None,
        lengths: Lengths = None,
        padding: Tensor | None = None,
    ) -> StepOutput:
        convolved, tail = self.conv(x, None if state is None else state.tails[0], lengths)
        x = silu(convolved)
        out, after = super().flow(x, x, state, lengths, padding)
        return StepOutput(out, RecurrentState(after.recurrent, (tail,)))

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        decay = logsigmoid(to_accum(k)) / self.temperature
        return Inputs(q, -torch.expm1(decay), v, decay=decay)

    def run(self, inputs: Inputs, *, lengths: Lengths = None, state: Tensor | None = None) -> Recurrent:
        out, state = super().run(inputs, lengths=lengths, state=state)
        share = self.heads // self.kv_heads
        k, v = (y.repeat_interleave(share, dim=1) for y in (inputs.k, inputs.v))
        weight = (inputs.q * self.stress.unsqueeze(1) * k).sum(-1, keepdim=True)  # (B, H, N, 1)
        return Recurrent(out + torch.sigmoid(weight * v).to(out.dtype), state)

    def read_out(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.to_out(join_heads(layer_norm(heads, heads.shape[-1:])) * silu(self.to_gate(x)))

    @property
    def tail_shapes(self) -> list[tuple[int, int]]:
        return [self.conv.tail_shape]


@register(
    "rodimus",
    papers=("Rodimus / Rodimus+",),
    formula="S_t = Diag(exp(-g_t τ_t)) S_{t-1} + (g_t^τ_t ⊙ k_t) u_tᵀ, g_t = softplus(W x_t), τ_t = σ(W' x_t)",
    supports={"causal", "padding", "packed", "decode"},
    notes=(
        "Around it stands the authors' block: widened tokens, one short convolution, a low-rank input gate, a residual "
        "and a norm after the gate. Gates start as in their code: g log-uniform in [0.001, 0.1], τ uniform in "
        "[1/16, 0.9]. Padding lies at the ends of a sequence: inside it, the convolution would read it "
        "as zeros."
    ),
)
class Rodimus(RecurrentMixer):
    """Linear attention with tempered selection: one gate fades the state and, tempered alike, lets the token in.

    Tokens are widened ``expand`` times; each of the ``heads`` (one, in the paper) has ``memory`` key channels.

    >>> mixer = Rodimus(64, memory=32)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

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
        self.to_fading, self.to_tempering = (nn.Linear(width, heads * memory) for _ in range(2))
        with torch.no_grad():
            self.to_fading.bias.copy_(small_steps(heads * memory))
            self.to_tempering.bias.uniform_(1 / 16, 0.9).logit_()
        rank = rank or max(dim // 64, 16)
        self.to_rank, self.to_v = nn.Linear(width, rank, bias=False), nn.Linear(rank, width)
        self.residual = nn.Parameter(torch.ones(width))
        self.norm = nn.RMSNorm(width, eps=1e-5)

    def flow(
        self,
        x: Tensor,
        context: Tensor,
        state: RecurrentState | None = None,
        lengths: Lengths = None,
        padding: Tensor | None = None,
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

    @property
    def tail_shapes(self) -> list[tuple[int, int]]:
        return [self.conv.tail_shape]
