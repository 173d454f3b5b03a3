"""What the implementations that run selections have in common: a call without its tensors, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from foveate.attention.bias import Bias
from foveate.attention.call import Call
from foveate.attention.dropout import Dropout
from foveate.attention.partial import Partial
from foveate.attention.weights import Kind
from foveate.native.neighborhood import Windows
from foveate.patterns.algebra import Pattern
from foveate.patterns.band import Band
from foveate.patterns.layouts import Layout
from foveate.patterns.selection import Selection

TILE = 64
WIDEST = 256  # channels of a head in the native kernels


Seen = Selection | Band | Windows


class Spec(NamedTuple):
    """All of a call but its tensors."""

    seen: Seen
    biases: tuple[Bias, ...]
    kind: Kind
    scale: float
    softcap: float | None
    dropout: Dropout | None = None


class Kernels(Protocol):
    """A module that attends over what a Spec says."""

    def sees(self, q: Tensor, k: Tensor, pattern: Pattern, layout: Layout, scale: float, *, plain: bool) -> Seen:
        """What the pattern shows, in the form these kernels run; plain calls are softmax without bias or soft-cap."""

    def forward(self, spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Heads out (B, H, N, Dv) and log row sums (B, H, N), zeros for unnormalised weights."""

    def backward(
        self,
        spec: Spec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor,
    ) -> tuple[Tensor, ...]:
        """Gradients of q, k, v and of each bias's parameter."""


def run(call: Call, name: str, kernels: Kernels) -> Partial:
    """Select, then attend; under torch.compile as one operator of torch's dispatcher."""
    if torch.compiler.is_compiling():
        from foveate.attention.ops import attend_selected

        return attend_selected(call, name)
    plain = is_plain(call.kind, call.biases, call.softcap)
    seen = kernels.sees(call.q, call.k, call.pattern, call.layout, call.scale, plain=plain)
    spec = Spec(seen, call.biases, call.kind, call.scale, call.softcap, call.dropout)
    parameters = [bias.parameter for bias in call.biases]
    out, lse = _Attend.apply(kernels, spec, call.q, call.k, call.v, *parameters)
    return Partial(out, lse if call.kind == "softmax" else None)


def is_plain(kind: Kind, biases: Sequence[Bias], softcap: float | None) -> bool:
    """Whether logits are scaled products and nothing more, and weights their softmax."""
    return kind == "softmax" and not biases and softcap is None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, spec: Spec, q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, lse = kernels.forward(spec, q, k, v)
        ctx.kernels, ctx.spec = kernels, spec
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.kernels.backward(ctx.spec, *ctx.saved_tensors, *grads))
