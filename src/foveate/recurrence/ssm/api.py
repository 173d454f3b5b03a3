"""State spaces that no token changes: a recurrence, and the convolution that it amounts to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.counts import whole_numbers
from foveate.dispatch import Facts, Operator
from foveate.precision import no_autocast
from foveate.recurrence.ssm.impl.doubling import DOUBLING
from foveate.recurrence.ssm.impl.fft import FFT
from foveate.recurrence.ssm.impl.reference import REFERENCE, SHARED_REFERENCE
from foveate.recurrence.ssm.inputs import Call, SharedCall


class Evolved(NamedTuple):
    """What comes out, (B, N, C) in x's dtype, and the complex state after it (None where it was not asked for)."""

    out: Tensor
    state: Tensor | None


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
    with no_autocast(x.device.type):
        if lengths is not None:
            each = partial(evolve, final=False, chunk=chunk, impl=impl)
            outs = [each(piece, transition, write, read).out for piece in x.split(list(lengths), dim=1)]
            return Evolved(torch.cat(outs, dim=1), None)
        call = Call(x.to(transition.real.dtype), transition, write, read, state, final, chunk)
        out, state = EVOLVE(call, impl)
        return Evolved(out.to(x.dtype), state)


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
    return EVOLVE_SHARED(SharedCall(u, transition, state), impl)


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


def _no_tokens(call: SharedCall) -> tuple[Tensor, Tensor] | None:
    return None if call.u.shape[1] else (call.u, call.state)


def _described(call: Call) -> Facts:
    return {"channels": call.transition.shape[0], "states": call.transition.shape[1]}


def _shared_described(call: SharedCall) -> Facts:
    return {"states": call.transition.shape[0]}


EVOLVE: Operator[Call, tuple[Tensor, Tensor | None]] = Operator("evolve", [FFT, REFERENCE], describe=_described)
EVOLVE_SHARED: Operator[SharedCall, tuple[Tensor, Tensor]] = Operator(
    "evolve_shared", [DOUBLING, SHARED_REFERENCE], describe=_shared_described, trivial=_no_tokens
)
