"""RWKV-6 and RWKV-7: matrix states that fade channel by channel, and in RWKV-7 are turned by every token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize, silu

from foveate.catalogue.registry import Reference, register
from foveate.layers.token_shift import last_of, mixed, previous, ramp
from foveate.mixers.base import StepOutput, divided, join_heads, split_heads
from foveate.mixers.recurrent import Inputs
from foveate.mixers.stateful import Lengths, StatefulMixer
from foveate.precision import accum_dtype, to_accum
from foveate.recurrence import Recurrent, recur


class LowRank(nn.Module):
    """``bias + act(x A) B``: what RWKV makes decays, gates and shares of."""

    def __init__(
        self, dim: int, rank: int, out: int, act: nn.Module | None = None, *, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, rank, bias=False), nn.Linear(rank, out, bias=False)
        self.act = nn.Identity() if act is None else act
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.up(self.act(self.down(x)))
        return out if self.bias is None else out + self.bias


class RWKVState(NamedTuple):
    """The last token (B, C), and the state (B, H, D, D)."""

    last: Tensor
    matrix: Tensor


class MatrixRWKV(StatefulMixer):
    """What RWKV-6 and RWKV-7 share: token shift, a recurrence on ``recur``, a norm of each head, and a gate.

    ``initial`` gives the state before the first token a parameter, to be tuned with all others frozen.
    """

    def __init__(self, dim: int, heads: int = 8, *, initial: bool = False, causal: bool = True) -> None:
        super().__init__(dim, causal=causal)
        self.heads, self.head_dim = heads, divided(dim, heads)
        self.to_r, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.gain, self.offset = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.initial = nn.Parameter(torch.zeros(self.state_shape)) if initial else None

    # ---- what a mechanism defines ----------------------------------------------------------------------

    def mixtures(self, before: Tensor, x: Tensor) -> Sequence[Tensor]:
        """What each projection sees of tokens x (B, N, C) and those before them; the gate's is the last."""
        raise NotImplementedError

    def inputs(self, *seen: Tensor) -> Inputs:
        """The recurrence's inputs from what their projections see."""
        raise NotImplementedError

    def gated(self, normed: Tensor, inputs: Inputs, seen: Tensor) -> Tensor:
        """Tokens (B, N, C) from normed heads (B, N, C) and what the gate sees."""
        raise NotImplementedError

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Heads, keys and values of the state, (H, D, Dv)."""
        return self.heads, self.head_dim, self.head_dim

    # ---- forward and step ------------------------------------------------------------------------------

    def run(self, x: Tensor, state: RWKVState | None, lengths: Lengths, key_mask: Tensor | None) -> StepOutput:
        before = self.empty_state(x.shape[0], None) if state is None else state
        *seen, gate = self.mixtures(previous(x, before.last, lengths), x)
        inputs = self.inputs(*seen)
        if key_mask is not None:
            inputs = inputs.mask_padding(key_mask)
        matrix = before.matrix if lengths is None else before.matrix.expand(len(lengths), -1, -1, -1)
        heads, matrix = self.recall(inputs, matrix, lengths)
        normed = layer_norm(heads, heads.shape[-1:], eps=1e-5 * self.head_dim)
        out = self.gated(join_heads(normed) * self.gain + self.offset, inputs, gate)
        return StepOutput(self.to_out(out.to(x.dtype)), RWKVState(last_of(before.last, x), matrix))

    def recall(self, inputs: Inputs, state: Tensor, lengths: Lengths) -> Recurrent:
        """The recurrence itself, out (B, H, N, D)."""
        return recur(**vars(inputs), state=state, lengths=lengths)

    def empty_state(self, batch: int, capacity: int | None) -> RWKVState:
        dtype = accum_dtype(self.weight.dtype)
        state = self.weight.new_zeros(self.state_shape) if self.initial is None else self.initial
        return RWKVState(self.weight.new_zeros(batch, self.dim), state.to(dtype).expand(batch, -1, -1, -1))


@register(
    "rwkv6",
    papers=None,
    reference=Reference(
        "Peng et al.", "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", "2404.05892"
    ),
    family="recurrent-ssm",
    formula="o_t = r_tᵀ (S_{t-1} + Diag(u) k_t v_tᵀ), S_t = Diag(exp(-exp(d_t))) S_{t-1} + k_t v_tᵀ",
    supports={"causal", "padding", "packed", "decode"},
    notes="The time mixing of RWKV-6 (Finch). Tokens see the one before them: padding lies at the ends of a sequence.",
)
class RWKV6(MatrixRWKV):
    """A state that fades by a gate of every channel, read with a bonus for the present token.

    How much of the token before it each projection sees, and the decays, come out of low-rank maps of the token.

    >>> mixer = RWKV6(64, heads=4)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    def __init__(self, dim: int, heads: int = 8, *, rank: int = 32, decay_rank: int = 64, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        self.share = nn.Parameter(1 - ramp(dim))
        self.shares = nn.Parameter((1 - ramp(dim)).repeat(5, 1))
        self.to_ranks = nn.Linear(dim, 5 * rank, bias=False)
        self.to_shares = nn.Parameter(torch.empty(5, rank, dim).uniform_(-0.01, 0.01))
        self.to_decay = LowRank(dim, decay_rank, dim, nn.Tanh(), bias=-6 + 5 * ramp(dim))
        self.to_gate = nn.Linear(dim, dim, bias=False)
        self.bonus = nn.Parameter((1 - ramp(dim)).view(heads, -1))

    def mixtures(self, before: Tensor, x: Tensor) -> Sequence[Tensor]:
        ranks = torch.tanh(self.to_ranks(mixed(x, before, self.share))).unflatten(-1, (5, -1))
        shares = self.shares[:, None, None] + torch.einsum("bnsr,src->sbnc", ranks, self.to_shares)
        return mixed(x, before, shares).unbind(0)

    def inputs(self, *seen: Tensor) -> Inputs:
        for_r, for_k, for_v, for_decay = seen
        r, k, v = self.to_r(for_r), self.to_k(for_k), self.to_v(for_v)
        decay = -to_accum(self.to_decay(for_decay)).exp()
        r, k, v, decay = (split_heads(y, self.heads) for y in (r, k, v, decay))
        return Inputs(r, k, v, decay=decay, bonus=self.bonus, scale=1.0)

    def gated(self, normed: Tensor, inputs: Inputs, seen: Tensor) -> Tensor:
        return normed * silu(self.to_gate(seen))


@register(
    "rwkv7",
    papers=None,
    reference=Reference("Peng et al.", 'RWKV-7 "Goose" with Expressive Dynamic State Evolution', "2503.14456"),
    family="recurrent-ssm",
    formula="S_t = (Diag(w_t) - (a_t ⊙ κ_t) κ_tᵀ) S_{t-1} + k_t v_tᵀ, o_t = r_tᵀ S_t + (r_t ⊙ u)ᵀ k_t v_tᵀ",
    supports={"causal", "padding", "packed", "decode"},
    notes=(
        "The time mixing of RWKV-7 (Goose) as in a model's first layer: later ones also mix in that layer's values. "
        "Tokens see the one before them: padding lies at the ends of a sequence."
    ),
)
class RWKV7(MatrixRWKV):
    """A state that fades in every channel and from which each token takes out part of what its removal key recalls.

    >>> mixer = RWKV7(64, heads=4)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    def __init__(self, dim: int, heads: int = 8, *, rank: int = 64, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        self.shares = nn.Parameter((1 - ramp(dim)).repeat(6, 1))
        self.to_decay = LowRank(dim, rank, dim, nn.Tanh(), bias=-6 + 6 * ramp(dim))
        self.to_rate = LowRank(dim, rank, dim, bias=torch.zeros(dim))
        self.to_gate = LowRank(dim, 2 * rank, dim, nn.Sigmoid())
        self.removal, self.retained = nn.Parameter(torch.full((dim,), 0.85)), nn.Parameter(torch.ones(dim))
        self.bonus = nn.Parameter(torch.zeros(heads, self.head_dim))

    def mixtures(self, before: Tensor, x: Tensor) -> Sequence[Tensor]:
        return mixed(x, before, self.shares[:, None, None]).unbind(0)

    def inputs(self, *seen: Tensor) -> Inputs:
        return self.turned(*self.parts(*seen))

    def parts(self, *seen: Tensor) -> list[Tensor]:
        """Receptance, key, value, log-decay, removal key and its rate, (B, H, N, D) each."""
        for_r, for_k, for_v, for_decay, for_rate = seen
        k, rate = to_accum(self.to_k(for_k)), torch.sigmoid(to_accum(self.to_rate(for_rate)))
        decay = -math.exp(-0.5) * torch.sigmoid(to_accum(self.to_decay(for_decay)))
        key = k * (1 + (rate - 1) * self.retained)
        parts = (self.to_r(for_r), key, self.to_v(for_v), decay, k * self.removal, rate)
        return [split_heads(part, self.heads) for part in parts]

    def turned(self, r: Tensor, k: Tensor, v: Tensor, decay: Tensor, removal: Tensor, rate: Tensor) -> Inputs:
        removal = normalize(removal, dim=-1)
        return Inputs(r, k, v, decay=decay, low_rank=(-removal, removal * rate), scale=1.0)

    def gated(self, normed: Tensor, inputs: Inputs, seen: Tensor) -> Tensor:
        weight = (inputs.q * inputs.k * self.bonus.unsqueeze(1)).sum(-1, keepdim=True)
        return (normed + join_heads(weight * inputs.v)) * self.to_gate(seen)
