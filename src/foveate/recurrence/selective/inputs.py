"""The inputs of the scans as their implementations see them: cut along time, in the arithmetic's dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from foveate.precision import accum_dtype
from foveate.recurrence.linear.inputs import join


@dataclass(frozen=True)
class Inputs:
    """Tensors of a call as the caller laid them out; those named in ``per_token`` are (B, N, ...)."""

    per_token: ClassVar[tuple[str, ...]] = ()

    x: Tensor  # (B, N, C)

    def tensors(self) -> dict[str, Tensor]:
        """Those that were given, by name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor)}

    @property
    def dtype(self) -> torch.dtype:
        """What the arithmetic and the state are held in."""
        return accum_dtype(*self.tensors().values())

    def to_accum(self) -> Self:
        """The same in the arithmetic's dtype."""
        dtype = self.dtype
        return replace(self, **{name: x.to(dtype) for name, x in self.tensors().items()})

    def split(self, lengths: Sequence[int]) -> list[Self]:
        """Consecutive stretches of tokens. By torch.split, whose backward is one cat, where slices would each pad."""
        given = {name: x for name, x in self.tensors().items() if name in self.per_token}
        pieces = zip(*(x.split(list(lengths), 1) for x in given.values()), strict=True)
        return [replace(self, **dict(zip(given, piece, strict=True))) for piece in pieces]


@dataclass(frozen=True)
class ScanInputs(Inputs):
    """A selective scan, see :func:`foveate.recurrence.selective.api.scan`."""

    per_token = ("x", "dt", "B", "C", "z")

    dt: Tensor  # (B, N, C)
    A: Tensor  # (C, S)
    B: Tensor  # (B, N, groups, S)
    C: Tensor  # (B, N, groups, S)
    D: Tensor | None  # (C,)
    z: Tensor | None  # (B, N, C)
    dt_bias: Tensor | None  # (C,)
    softplus: bool

    def steps(self) -> Tensor:
        """The step sizes (B, N, C)."""
        dt = self.dt if self.dt_bias is None else self.dt + self.dt_bias
        return softplus(dt) if self.softplus else dt

    def per_channel(self, x: Tensor) -> Tensor:
        """B or C for each channel that its groups serve, (B, N, 1 or C, S)."""
        share = self.x.shape[2] // x.shape[2]
        return x if x.shape[2] == 1 else x.repeat_interleave(share, 2)

    def finished(self, y: Tensor) -> Tensor:
        """What was read (B, N, C), with the skip and the gate."""
        y = y if self.D is None else y + self.D * self.x
        return y if self.z is None else y * silu(self.z)


@dataclass(frozen=True)
class LinearInputs(Inputs):
    """A linear scan, see :func:`foveate.recurrence.selective.api.linear_scan`."""

    per_token = ("x", "decay")

    decay: Tensor  # (B, N, C)


@dataclass(frozen=True)
class ConvInputs(Inputs):
    """A causal convolution, see :func:`foveate.recurrence.selective.api.causal_conv`."""

    per_token = ("x",)

    weight: Tensor  # (C, W)
    bias: Tensor | None  # (C,)
    silu: bool

    def finished(self, y: Tensor) -> Tensor:
        """The sum of the taps (B, N, C), with bias and activation."""
        y = y if self.bias is None else y + self.bias
        return silu(y) if self.silu else y


Lengths = Sequence[int] | None


class Call(NamedTuple):
    """A call of one of the operators, checked and completed."""

    inputs: Inputs
    state: Tensor  # of a convolution its tail; one for each packed sequence
    lengths: Lengths


def state_facts(call: Call) -> dict[str, Any]:
    """What `explain` says of any call's state."""
    return {"tokens": call.inputs.x.shape[1], "state_bytes": call.state.numel() * call.state.element_size()}


Form = Callable[[Any, Tensor], tuple[Tensor, Tensor]]  # inputs and state to out and state, for at least one token
Forms = dict[type[Inputs], Form]


def one_by_one(forms: Forms, inputs: Any, state: Tensor, lengths: Lengths) -> tuple[Tensor, Tensor]:
    """Run a form that knows of one sequence at a time on each of those packed."""
    form = forms[type(inputs)]
    if lengths is None:
        return _or_nothing(form, inputs, state)
    pieces = zip(inputs.split(lengths), state.split(1), strict=True)
    outs, states = zip(*(_or_nothing(form, piece, before) for piece, before in pieces), strict=True)
    return join(outs, 1), join(states, 0)


def _or_nothing(form: Form, inputs: Any, state: Tensor) -> tuple[Tensor, Tensor]:
    return form(inputs, state) if inputs.x.shape[1] else (inputs.x.clone(), state)
