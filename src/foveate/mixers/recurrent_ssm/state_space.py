"""State spaces that tokens do not change: S4D, S5 and H3, each a convolution and a recurrence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from foveate.catalogue.registry import Reference, register
from foveate.mixers.base import StepOutput
from foveate.mixers.stateful import Lengths, StatefulMixer
from foveate.precision import to_accum
from foveate.recurrence.selective.api import causal_conv
from foveate.recurrence.ssm import Discrete, Evolved, discretize, evolve, evolve_shared, hippo_rates, linear_rates

ROUNDED = "transforms mix all tokens, and gradients to later ones cancel but for rounding"


class Dynamics(nn.Module):
    """Rates and step sizes of a diagonal state space (shape...), discretised when called.

    >>> Dynamics(hippo_rates(4).expand(6, 4), steps=6)().transition.shape
    torch.Size([6, 4])
    """

    def __init__(self, rates: Tensor, *, steps: int, method: str = "zoh") -> None:
        super().__init__()
        self.method = method
        dtype = torch.get_default_dtype()
        self.log_decay = nn.Parameter((-rates.real).log().to(dtype))
        self.frequency = nn.Parameter(rates.imag.to(dtype, copy=True))
        self.log_step = nn.Parameter(torch.empty(steps).uniform_(math.log(1e-3), math.log(1e-1)))

    def forward(self) -> Discrete:
        rates = torch.complex(-to_accum(self.log_decay).exp(), to_accum(self.frequency))
        step = to_accum(self.log_step).exp()
        return discretize(rates, step.unsqueeze(-1) if rates.dim() == 2 else step, self.method)


class DiagonalSSM(nn.Module):
    """S4D: in each channel ``state`` real numbers as half as many complex ones, and a skip connection.

    >>> DiagonalSSM(6, state=8)(torch.randn(2, 9, 6)).out.shape
    torch.Size([2, 9, 6])
    """

    def __init__(
        self,
        channels: int,
        state: int = 64,
        *,
        method: str = "zoh",
        rates: Callable[[int], Tensor] = hippo_rates,
    ) -> None:
        super().__init__()
        pairs = halved(state)
        self.dynamics = Dynamics(rates(pairs).expand(channels, pairs), steps=channels, method=method)
        self.read = complex_parameter(channels, pairs)
        self.D = nn.Parameter(torch.randn(channels))

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        final: bool = True,
        lengths: Lengths = None,
        chunk: int | None = None,
    ) -> Evolved:
        """Evolve x (B, N, C) after ``state`` (B, C, S / 2), in pieces of ``chunk`` tokens."""
        transition, entry = self.dynamics()
        read = as_complex(self.read)
        y, after = evolve(x, transition, entry, read, state=state, final=final, lengths=lengths, chunk=chunk)
        return Evolved(y + self.D * x, after)

    def init_state(self, batch: int) -> Tensor:
        """The state before the first token."""
        return as_complex(self.read).new_zeros(batch, *self.read.shape[:2])


class State(NamedTuple):
    """The complex numbers of a state space."""

    numbers: Tensor


@register(
    "s4d",
    papers=None,
    reference=Reference(
        "Gu, Gupta, Goel, Ré",
        "On the Parameterization and Initialization of Diagonal State Space Models",
        "2206.11893",
    ),
    family="recurrent-ssm",
    formula="h_t = exp(Δ A) h_{t-1} + B̄ x_t, y_t = 2 Re(C h_t) + D x_t, out = GLU(W gelu(y))",
    supports={"causal", "padding", "packed", "decode"},
    notes="B is 1, as C stands for both. A starts as in S4D-LegS. Padding lies at the ends of a sequence.",
)
class S4D(StatefulMixer):
    """In each channel a diagonal state space, which is a convolution with a filter as long as the sequence.

    ``state`` real numbers are kept a channel; ``method`` of discretisation is "zoh" or "bilinear". ``chunk`` bounds
    the tokens of one transform; None takes in all at once.

    >>> mixer = S4D(64)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
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
        y, after = self.ssm(x, before, final=state is not None, lengths=lengths, chunk=self.chunk)
        out, gate = self.to_out(gelu(y)).chunk(2, dim=-1)
        return StepOutput(out * torch.sigmoid(gate), None if after is None else State(after))

    def empty_state(self, batch: int, capacity: int | None) -> State:
        return State(self.ssm.init_state(batch))


@register(
    "s5",
    papers=None,
    reference=Reference(
        "Smith, Warrington, Linderman", "Simplified State Space Layers for Sequence Modeling", "2208.04933"
    ),
    family="recurrent-ssm",
    formula="h_t = exp(Δ A) h_{t-1} + B̄ x_t, y_t = 2 Re(C h_t) + D x_t with one h for all channels, out = g ⊙ σ(W g)",
    supports={"causal", "padding", "packed", "decode"},
    notes="g is gelu(y). A starts as the paper's with one block. Padding lies at the ends of a sequence.",
)
class S5(StatefulMixer):
    """One diagonal state space for all channels together, computed by a parallel scan.

    ``state`` real numbers are kept in all.

    >>> mixer = S5(64)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

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
        y = 2 * (states @ as_complex(self.read).mT).real.to(x.dtype) + self.D * x
        g = gelu(y)
        return StepOutput(g * torch.sigmoid(self.to_gate(g)), State(after))

    def empty_state(self, batch: int, capacity: int | None) -> State:
        return State(as_complex(self.write).new_zeros(batch, self.write.shape[0]))


class Shifted(NamedTuple):
    """The complex state (B * D * D, H, S / 2) of H3, and the keys (B, C, shift - 1) that it still holds."""

    numbers: Tensor
    tail: Tensor


@register(
    "h3",
    papers=("H3",),
    formula="o = q · SSM_diag(SSM_shift(k) vᵀ), by heads, out = W o",
    supports={"causal", "padding", "packed", "decode"},
    notes=(
        "As in the authors' code A starts as in S4D-Lin and is discretised by the trapezoidal rule, and head_dim is 1. "
        "What they keep beside the shift, a factor of the newest key, is part of the shift here. Padding lies at the "
        "ends of a sequence."
    ),
)
class H3(StatefulMixer):
    """Keys remembered by a shift, their products with values by a diagonal state space, read by queries.

    Heads have ``head_dim`` channels; ``shift`` is how many keys the shift holds, ``state`` the real numbers kept
    for each product of a key's and a value's channel. ``chunk`` bounds the tokens of one transform, the state
    passing on; None takes in all at once.

    >>> mixer = H3(64)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
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


def complex_parameter(*shape: int, scale: float = 1.0) -> nn.Parameter:
    """Complex numbers as pairs of real ones (..., 2), of standard deviation ``scale``."""
    return nn.Parameter(torch.randn(*shape, 2) * scale * 2**-0.5)


def as_complex(parameter: Tensor) -> Tensor:
    return torch.view_as_complex(to_accum(parameter))


def halved(state: int) -> int:
    """Complex numbers that stand for ``state`` real ones."""
    if state < 2 or state % 2:
        raise ValueError(f"state counts real numbers, two for each complex one; got {state}")
    return state // 2
