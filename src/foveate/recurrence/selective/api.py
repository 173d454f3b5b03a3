"""The scans: states that decay channel by channel, and the short convolution before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from foveate.counting import counted
from foveate.counts import whole_numbers
from foveate.dispatch import Facts, Operator
from foveate.precision import no_autocast
from foveate.recurrence.cost import conv_cost, empty_conv, empty_linear_scan, empty_scan, linear_scan_cost, scan_cost
from foveate.recurrence.selective.checks import (
    check_conv,
    check_lengths,
    check_linear,
    check_scan,
    check_state,
    check_tail,
)
from foveate.recurrence.selective.impl.chunks import CHUNKS
from foveate.recurrence.selective.impl.native import NATIVE
from foveate.recurrence.selective.impl.reference import REFERENCE
from foveate.recurrence.selective.impl.short import scan_token
from foveate.recurrence.selective.inputs import Call, ConvInputs, LinearInputs, ScanInputs


class Scanned(NamedTuple):
    """What `scan`, `scan_step` and `linear_scan` return."""

    out: Tensor  # (B, N, C), in x's dtype
    state: Tensor  # (B, C, S) of scan, (B, C) of linear_scan; one for each packed sequence


class Convolved(NamedTuple):
    """What `causal_conv` returns."""

    out: Tensor  # (B, N, C), in x's dtype
    tail: Tensor  # (B, C, width - 1), in x's dtype: the inputs that later tokens still read


@counted("scan", scan_cost, lambda *args, **options: Scanned(*empty_scan(*args, **options)))
def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = False,
    state: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    impl: str = "auto",
) -> Scanned:
    """Scan tokens selectively (S6, Mamba): each channel keeps S numbers, which every token fades and adds to.

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t      for each channel, h of S numbers, 0 at first
        y_t = C_t . h_t + D x_t                       times silu(z_t) if there is a gate

    >>> import torch
    >>> x, z = torch.randn(2, 1, 100, 6)
    >>> dt, B, C = torch.randn(1, 100, 6), torch.randn(1, 100, 16), torch.randn(1, 100, 16)
    >>> A = -torch.arange(1.0, 17.0).expand(6, 16)
    >>> out, state = scan(x, dt, A, B, C, D=torch.ones(6), z=z, dt_bias=torch.zeros(6), softplus=True)
    >>> out.shape, state.shape
    (torch.Size([1, 100, 6]), torch.Size([1, 6, 16]))

    Shapes: x, dt, z and out (B, N, C), tokens first, any strides.
        A         (C, S), real, at most 0.
        B, C      (B, N, S), or (B, N, groups, S): channel c reads group c // (C / groups).
        D         (C,).
        dt_bias   (C,), added to dt. softplus=True then takes the softplus; without it dt is at least 0.
        state     (B, C, S), what an earlier call returned. It is not written to.
        lengths   of sequences packed one after another in N, with B = 1; they may be 0. Then there is one state
                  each, (len(lengths), C, S), and nothing leaks between them.

    impl is "reference" (the formula, token by token), "chunks" (parallel inside chunks, on any device), "native"
    (kernels on a CPU) or "auto".

    dtypes: each tensor of any floating dtype; arithmetic and state are float64 if one of them is and float32
    otherwise, also under autocast; out has x's dtype. Differentiable in every tensor, state included.

    Raises ValueError or TypeError on ill-fitting input, NotImplementedError where the implementation asked for
    cannot run the call. The signs of A and dt are checked on the CPU only, and not while compiling: on a GPU
    looking at them would wait for the device.

    Paper: Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, arXiv 2312.00752.
    """
    if lengths is None and isinstance(x, Tensor) and x.shape[-2:-1] == (1,) and SCAN.takes("native", impl):
        found = scan_token(x, dt, A, B, C, D, z, dt_bias, softplus, state)
        if found is not None:
            return Scanned(*found)
    lengths = None if lengths is None else whole_numbers("lengths", lengths)
    B, C = (v.unsqueeze(2) if isinstance(v, Tensor) and v.dim() == 3 else v for v in (B, C))
    inputs = ScanInputs(x, dt, A, B, C, D, z, dt_bias, softplus)
    check_scan(inputs)
    state = _state(inputs, state, lengths, tuple(A.shape))
    return Scanned(*_run(SCAN, Call(inputs, state, lengths), impl))


def scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = False,
    state: Tensor | None = None,
    impl: str = "auto",
) -> Scanned:
    """Advance a selective scan by one token: `scan` for N = 1, as a decoder calls it.

    >>> import torch
    >>> x, B, C = torch.randn(1, 1, 6), torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    >>> out, state = scan_step(x, torch.ones(1, 1, 6), torch.full((6, 16), -1.0), B, C)
    >>> out, state = scan_step(x, torch.ones(1, 1, 6), torch.full((6, 16), -1.0), B, C, state=state)

    Shapes, dtypes, errors and the paper are those of `scan`; x has one token, (B, 1, C).
    """
    if isinstance(x, Tensor) and x.dim() == 3 and x.shape[1] != 1:
        raise ValueError(f"scan_step takes one token, (B, 1, C), got x {tuple(x.shape)}; use scan for several")
    return scan(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, softplus=softplus, state=state, impl=impl)


@counted("linear_scan", linear_scan_cost, lambda *args, **options: Scanned(*empty_linear_scan(*args, **options)))
def linear_scan(
    x: Tensor,
    decay: Tensor,
    *,
    state: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    impl: str = "auto",
) -> Scanned:
    """Scan tokens linearly: each channel keeps one number, which every token fades and adds to.

        h_t = exp(decay_t) h_{t-1} + x_t      which is also what comes out

    >>> import torch
    >>> out, state = linear_scan(torch.ones(1, 3, 1), torch.tensor(0.5).log().expand(1, 3, 1))
    >>> out.flatten()
    tensor([1.0000, 1.5000, 1.7500])

    Shapes: x, decay and out (B, N, C), tokens first, any strides.
        decay     log-factors in [-inf, 0]; -inf forgets all.
        state     (B, C), what an earlier call returned. It is not written to.
        lengths   of packed sequences as in `scan`; then state is (len(lengths), C).
    impl, dtypes and errors are those of `scan`. Differentiable in every tensor, state included.

    Paper: Martin and Cundy, Parallelizing Linear Recurrent Neural Nets Over Sequence Length, arXiv 1709.04057.
    """
    lengths = None if lengths is None else whole_numbers("lengths", lengths)
    inputs = LinearInputs(x, decay)
    check_linear(inputs)
    state = _state(inputs, state, lengths, tuple(x.shape[2:]))
    return Scanned(*_run(LINEAR_SCAN, Call(inputs, state, lengths), impl))


@counted("causal_conv", conv_cost, lambda *args, **options: Convolved(*empty_conv(*args, **options)))
def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tail: Tensor | None = None,
    activation: Literal["silu"] | None = None,
    lengths: Sequence[int] | None = None,
    impl: str = "auto",
) -> Convolved:
    """Convolve each channel with its last few tokens.

        y_t = bias + sum_i weight_i x_{t - (width - 1) + i}      i = 0 ... width - 1; then silu if asked for

    >>> import torch
    >>> out, tail = causal_conv(torch.arange(4.0).view(1, 4, 1), torch.tensor([[10.0, 1.0]]))
    >>> out.flatten(), tail.flatten()
    (tensor([ 0.,  1., 12., 23.]), tensor([3.]))

    Shapes: x and out (B, N, C), tokens first, any strides; weight (C, width), as of nn.Conv1d's without its middle
    axis; bias (C,).
        tail      (B, C, width - 1), the inputs before x: what an earlier call returned, zeros at first. Any
                  floating dtype; it is not written to.
        lengths   of packed sequences as in `scan`; then tail is (len(lengths), C, width - 1).
    impl, dtypes and errors are those of `scan`. Differentiable in every tensor, tail included.
    """
    if activation not in (None, "silu"):
        raise ValueError(f'activation must be None or "silu", got {activation!r}')
    lengths = None if lengths is None else whole_numbers("lengths", lengths)
    inputs = ConvInputs(x, weight, bias, activation == "silu")
    check_conv(inputs)
    shape = _sequences(x, lengths), x.shape[2], weight.shape[1] - 1
    if tail is None:
        tail = x.new_zeros(shape)
    check_tail(tail, shape, x.device)
    return Convolved(*_run(CAUSAL_CONV, Call(inputs, tail, lengths), impl))


def _run(operator: Operator[Call, tuple[Tensor, Tensor]], call: Call, impl: str) -> tuple[Tensor, Tensor]:
    with no_autocast(call.state.device.type):
        return operator(call, impl)


def _state(
    inputs: ScanInputs | LinearInputs, state: Tensor | None, lengths: Sequence[int] | None, shape: tuple[int, ...]
) -> Tensor:
    shape = (_sequences(inputs.x, lengths), *shape)
    if state is None:
        return torch.zeros(shape, dtype=inputs.dtype, device=inputs.x.device)
    check_state(state, shape, inputs.dtype, inputs.x.device)
    return state


def _sequences(x: Tensor, lengths: Sequence[int] | None) -> int:
    if lengths is None:
        return x.shape[0]
    check_lengths(x, lengths)
    return len(lengths)


def _described(call: Call) -> Facts:
    inputs = call.inputs
    size = (
        {"width": inputs.weight.shape[1]}
        if isinstance(inputs, ConvInputs)
        else {"states": math.prod(call.state.shape[2:])}
    )
    return {"channels": inputs.x.shape[2]} | size


def _operator(name: str) -> Operator[Call, tuple[Tensor, Tensor]]:
    return Operator(name, [NATIVE, CHUNKS, REFERENCE], describe=_described)


SCAN, LINEAR_SCAN, CAUSAL_CONV = map(_operator, ("scan", "linear_scan", "causal_conv"))
