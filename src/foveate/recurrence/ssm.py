"""State spaces that no token changes: a recurrence, and the convolution that it amounts to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp import is_autocast_available

from foveate.counts import whole_numbers
from foveate.options import FORCED

SHORT = 8  # tokens up to which the loop over tokens is faster than transforms


class Evolved(NamedTuple):
    """What comes out, (B, N, C) in x's dtype, and the complex state after it (None where it was not asked for)."""

    out: Tensor
    state: Tensor | None


class Discrete(NamedTuple):
    """A state space in steps: the logarithm of what is kept of each state, and how much of an input enters it."""

    transition: Tensor  # (..., S), complex
    entry: Tensor  # (..., S), complex


def discretize(rates: Tensor, step: Tensor, method: str = "zoh") -> Discrete:
    """Turn h' = rates h + x into steps h_t = exp(transition) h_{t-1} + entry x_t of sizes ``step``.

    >>> rates, step = torch.tensor([-1.0 + 2.0j]), torch.tensor([0.1])
    >>> transition, entry = discretize(rates, step)
    >>> torch.allclose(transition.exp(), 1 + rates * entry)
    True

    ``rates`` (..., S) are complex with negative real parts, ``step`` broadcasts against them. "zoh" holds inputs
    constant during a step, "bilinear" takes the trapezoidal rule.
    """
    turn = rates * step
    if method == "zoh":
        return Discrete(turn, (turn.exp() - 1) / rates)
    if method == "bilinear":
        return Discrete(torch.log((1 + turn / 2) / (1 - turn / 2)), step / (1 - turn / 2))
    raise ValueError(f'method is "zoh" or "bilinear"; got {method!r}')


def hippo_rates(count: int) -> Tensor:
    """Eigenvalues (count,), with positive imaginary part, of the normal part of the HiPPO-LegS matrix.

    They are complex64, or complex128 where float64 is torch's default dtype.

    >>> hippo_rates(2)
    tensor([-0.5000+0.5565j, -0.5000+4.6033j])

    Papers: Gu et al., HiPPO, arXiv 2008.07669; S4D-LegS in 2206.11893.
    """
    order = (torch.arange(2 * count, dtype=torch.float64, device=torch.get_default_device()) + 0.5).sqrt()
    skew = torch.outer(order, order).triu(1)
    imaginary = torch.linalg.eigvalsh(1j * (skew - skew.T))[count:]
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return torch.complex(*(part.to(dtype) for part in (torch.full_like(imaginary, -0.5), imaginary)))


def evolve(
    x: Tensor,
    transition: Tensor,
    write: Tensor,
    read: Tensor,
    *,
    state: Tensor | None = None,
    final: bool = True,
    lengths: Sequence[int] | None = None,
    chunk: int | None = None,
    impl: str = "auto",
) -> Evolved:
    """Evolve a diagonal state space in each channel (S4D): S complex numbers that fade, turn and take in x.

        h_t = exp(transition) h_{t-1} + write x_t         for each channel, h of S numbers, 0 at first
        y_t = 2 Re(read . h_t)                            one of each pair of conjugates is stored

    >>> x, transition = torch.randn(1, 100, 6), torch.complex(-torch.rand(6, 4), torch.randn(6, 4))
    >>> ones = torch.ones_like(transition)
    >>> y, state = evolve(x, transition, ones, ones)
    >>> y.shape, state.shape
    (torch.Size([1, 100, 6]), torch.Size([1, 6, 4]))

    Shapes: x and y (B, N, C); transition, write and read (C, S), complex, the real part of transition at most 0.
        state     (B, C, S), complex, what an earlier call returned.
        final     whether the state after the last token is wanted.
        lengths   of sequences packed one after another in N, with B = 1; they start afresh, and no state is kept.
        chunk     tokens that one transform takes in; the state passes from chunk to chunk. None: all at once.

    impl is "reference" (the formula, token by token), "fft" (convolution with the kernel 2 Re(read . exp(l
    transition) write), by transforms over twice the length, so that nothing wraps round) or "auto".

    Arithmetic is complex64, or complex128 if the coefficients are; out has x's dtype. Differentiable in all.

    Papers: Gu et al., On the Parameterization and Initialization of Diagonal State Space Models, arXiv 2206.11893;
    state passing: Fu et al., Hungry Hungry Hippos, 2212.14052.
    """
    lengths = None if lengths is None else whole_numbers("lengths", lengths)
    _check(x, transition, write, read, lengths)
    if lengths is not None and state is not None:
        raise ValueError("packed sequences start afresh: pass no state beside lengths")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is a number of tokens, at least 1; got {chunk}")
    with _no_autocast(x.device.type):
        if lengths is not None:
            each = partial(evolve, final=False, chunk=chunk, impl=impl)
            outs = [each(piece, transition, write, read).out for piece in x.split(list(lengths), dim=1)]
            return Evolved(torch.cat(outs, dim=1), None)
        few = 0 if x.shape[0] == 0 else x.shape[1]  # transforms of nothing are refused
        run = _token_by_token if _chosen(impl, "fft", few) == "reference" else _by_transform
        outs = []
        pieces = x.to(transition.real.dtype).split(chunk or max(1, x.shape[1]), dim=1)
        for number, piece in enumerate(pieces, 1):
            out, state = run(piece, transition, write, read, state, final or number < len(pieces))
            outs.append(out)
        return Evolved(torch.cat(outs, dim=1).to(x.dtype), state if final else None)


def _token_by_token(
    x: Tensor, transition: Tensor, write: Tensor, read: Tensor, state: Tensor | None, final: bool
) -> tuple[Tensor, Tensor]:
    h = transition.new_zeros(x.shape[0], *transition.shape) if state is None else state
    kept, outs = transition.exp(), []
    for token in x.unbind(1):
        h = kept * h + write * token.unsqueeze(-1)
        outs.append(2 * (read * h).sum(-1).real)
    return torch.stack(outs, dim=1) if outs else x, h


def _by_transform(
    x: Tensor, transition: Tensor, write: Tensor, read: Tensor, state: Tensor | None, final: bool
) -> tuple[Tensor, Tensor | None]:
    length = x.shape[1]
    if not length:
        return x, transition.new_zeros(x.shape[0], *transition.shape) if state is None else state
    y = fft_conv(x, kernel(transition, read * write, length))
    if state is not None:
        ages = torch.arange(1, length + 1, device=x.device)
        fading = powers(transition, ages)  # (C, S, N)
        y = y + 2 * torch.einsum("bcs,csn->bnc", state * read, fading).real
    if not final:
        return y, None
    left = write * remembered(x, transition)
    return y, left if state is None else left + powers(transition, length) * state


def kernel(transition: Tensor, weights: Tensor, length: int) -> Tensor:
    """The impulse response 2 Re(sum_s weights_s exp(l transition_s)) for l < length, (C, length), real.

    >>> kernel(torch.tensor([[0.5]]).log() + 0j, torch.ones(1, 1) + 0j, 3)
    tensor([[2.0000, 1.0000, 0.5000]])
    """
    side = math.isqrt(max(0, length - 1)) + 1  # l is a coarse step and a fine one: powers of 2 sqrt(L) ages suffice
    ages = torch.arange(side, device=transition.device)
    fine = powers(transition, ages)  # (C, S, side)
    coarse = weights.unsqueeze(-1) * powers(transition, side * ages)
    return 2 * (coarse.mT @ fine).real.flatten(1)[:, :length]


def remembered(x: Tensor, transition: Tensor) -> Tensor:
    """What states hold of x (B, N, C) after it: sum_t exp((N - 1 - t) transition) x_t, (B, C, S)."""
    batch, length, channels = x.shape
    side = math.isqrt(max(0, length - 1)) + 1
    front = x.new_zeros(batch, side * side - length, channels)
    blocks = torch.cat([front, x], dim=1).mT.unflatten(2, (side, side))  # (B, C, coarse, fine)
    ages = torch.arange(side - 1, -1, -1, device=x.device)
    fine = powers(transition, ages)  # (C, S, side)
    inner = blocks.to(transition.dtype) @ fine.mT  # (B, C, coarse, S)
    return (inner * powers(transition, side * ages).mT).sum(2)


def powers(transition: Tensor, ages: Tensor | int) -> Tensor:
    """exp(ages transition), (..., len(ages)); ages turn fast states round thousands of times, too far for float32."""
    exact = transition if transition.device.type == "mps" else transition.to(torch.complex128)
    exact = exact if isinstance(ages, int) else exact.unsqueeze(-1)
    return (exact * ages).exp().to(transition.dtype)


def fft_conv(x: Tensor, filters: Tensor) -> Tensor:
    """Convolve each channel of x (B, N, C) with its causal filter (C, L); nothing wraps round.

    >>> fft_conv(torch.tensor([1.0, 0.0, 2.0]).view(1, 3, 1), torch.tensor([[1.0, 0.5]])).flatten()
    tensor([1.0000, 0.5000, 2.0000])
    """
    length = x.shape[1]
    size = length + min(length, filters.shape[1])
    spectrum = torch.fft.rfft(x, n=size, dim=1) * torch.fft.rfft(filters[:, :length].mT, n=size, dim=0)
    return torch.fft.irfft(spectrum, n=size, dim=1)[:, :length]


def evolve_shared(
    u: Tensor, transition: Tensor, *, state: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """States that all channels share (S5): h_t = exp(transition) h_{t-1} + u_t, by a parallel scan.

    >>> u, transition = torch.ones(1, 3, 1) + 0j, torch.tensor([0.5]).log() + 0j
    >>> evolve_shared(u, transition)[0].real.flatten()
    tensor([1.0000, 1.5000, 1.7500])

    u and the states (B, N, S) and transition (S,) are complex; state (B, S) is what an earlier call returned last.
    impl is "reference" (token by token), "doubling" (log2 N steps, each over all tokens at once) or "auto".

    Paper: Smith et al., Simplified State Space Layers for Sequence Modeling, arXiv 2208.04933.
    """
    if not (u.is_complex() and transition.is_complex()) or u.dim() != 3 or u.shape[2:] != transition.shape:
        raise ValueError(f"u is complex (B, N, S) and transition (S,); got {tuple(u.shape)} {tuple(transition.shape)}")
    state = u.new_zeros(u.shape[0], u.shape[2]) if state is None else state
    if not u.shape[1]:
        return u, state
    if _chosen(impl, "doubling", u.shape[1]) == "reference":
        hs = []
        for token in u.unbind(1):
            state = transition.exp() * state + token
            hs.append(state)
        return torch.stack(hs, dim=1), state
    first = u[:, :1] + (transition.exp() * state).unsqueeze(1)
    h, reach = torch.cat([first, u[:, 1:]], dim=1), 1
    while reach < u.shape[1]:  # h_t holds the last ``reach`` inputs
        carried = powers(transition, reach) * h[:, :-reach]
        h = torch.cat([h[:, :reach], h[:, reach:] + carried], dim=1)
        reach *= 2
    return h, h[:, -1]


def _chosen(impl: str, parallel: str, length: int) -> str:
    name = (FORCED.get() or impl) if impl == "auto" else impl
    if name == "auto":
        return "reference" if length <= SHORT else parallel
    if name not in ("reference", parallel):
        raise ValueError(f'impl must be "auto", "reference" or "{parallel}", got {name!r}')
    return name


def _check(x: Tensor, transition: Tensor, write: Tensor, read: Tensor, lengths: Sequence[int] | None) -> None:
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x is real, (B, N, C); got {x.dtype} {tuple(x.shape)}")
    for name, each in (("transition", transition), ("write", write), ("read", read)):
        if not each.is_complex() or each.dim() != 2 or each.shape[0] != x.shape[2]:
            wanted = f"complex, (C, S) with C = {x.shape[2]}"
            raise ValueError(f"{name} is {wanted}; got {each.dtype} {tuple(each.shape)}")
    if lengths is not None and (x.shape[0] != 1 or min(lengths, default=-1) < 0 or sum(lengths) != x.shape[1]):
        raise ValueError(
            f"lengths of packed sequences add up to N, with B = 1; got {list(lengths)} for {tuple(x.shape)}"
        )


def _no_autocast(device: str) -> AbstractContextManager[None]:
    return torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext()
