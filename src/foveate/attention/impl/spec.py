"""What the implementations that run selections have in common: a call without its tensors, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from foveate import autodiff
from foveate.attention import documents
from foveate.attention.bias import Bias
from foveate.attention.call import Call
from foveate.attention.dropout import Dropout
from foveate.attention.impl.neighborhood import Windows
from foveate.attention.normalise import Normalise
from foveate.attention.partial import Partial, lse_dtype, sums_dtype
from foveate.attention.score import ScoreFunction
from foveate.attention.weights import Kind
from foveate.layouts.kinds import Grid, Layout
from foveate.patterns.algebra import Pattern
from foveate.patterns.band import Band
from foveate.patterns.rules.grid import neighborhood
from foveate.patterns.select.selection import Selection
from foveate.plain import differentiated, traced

TILE = 64
WIDEST = 256  # channels of a head in the native kernels


Seen = Selection | Band | Windows | documents.ByDocument


class Spec(NamedTuple):
    """All of a call but its tensors."""

    seen: Seen
    biases: tuple[Bias, ...]
    kind: Kind
    scale: float
    softcap: float | None
    dropout: Dropout | None = None

    @property
    def functions(self) -> tuple[ScoreFunction, ...]:
        """None: kernels take no functions of logits, which the definition asks for."""
        return ()

    @property
    def normalise(self) -> Normalise | None:
        """None likewise."""
        return None


class Kernels(Protocol):
    """A module that attends over what a Spec says."""

    def sees(self, q: Tensor, k: Tensor, pattern: Pattern, layout: Layout, scale: float, *, plain: bool) -> Seen:
        """What the pattern shows, in the form these kernels run; plain calls are softmax without bias or soft-cap."""

    def forward(self, spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Heads out (B, H, N, Dv) and log row sums (B, H, N) of ``sums_dtype(q)``, zeros for unnormalised weights."""

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


def refuse(call: Call) -> str | None:
    """Why no kernel can run the call, whichever it is; None if one might."""
    if call.normalise is not None:
        return f"it has softmax, sigmoid and relu weights, not {call.kind}"
    if call.functions:
        return "it has no score functions"
    if differentiated():
        return "derivatives in forward mode and by torch.func are those of the reference"
    if torch.compiler.is_compiling() or not traced(*call.tensors):
        return None
    from foveate.attention.impl.ops import travels

    return None if travels(call) else f"{call.pattern} on {call.layout} cannot be written into what torch records"


def run(call: Call, name: str, kernels: Kernels) -> Partial:
    """Select, then attend; as one operator of torch's dispatcher where a tensor is not plain, as in torch.compile."""
    if traced(*call.tensors):
        from foveate.attention.impl.ops import attend_selected

        return attend_selected(call, name)
    plain = is_plain(call.kind, call.biases, call.softcap)
    seen = documents.see(
        kernels,
        call.q,
        call.k,
        call.pattern,
        call.layout,
        call.scale,
        biases=call.biases,
        plain=plain,
        drops=call.dropout is not None,
    )
    spec = Spec(seen, call.biases, call.kind, call.scale, call.softcap, call.dropout)
    parameters = [bias.parameter for bias in call.biases]
    out, lse = autodiff.run(_Attend(kernels, spec), call.q, call.k, call.v, *parameters)
    return Partial(out, lse.to(lse_dtype(call.q)) if call.kind == "softmax" else None)


def is_plain(kind: Kind, biases: Sequence[Bias], softcap: float | None) -> bool:
    """Whether logits are scaled products and nothing more, and weights their softmax."""
    return kind == "softmax" and not biases and softcap is None


class _Attend(NamedTuple):
    """A call as autograd takes it; its inputs are q, k, v and the parameters of its biases."""

    kernels: Kernels
    spec: Spec

    def forward(self, *inputs: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        outputs = documents.forward(self.kernels, self.spec, *inputs[:3])  # type: ignore[arg-type]
        return outputs, outputs

    def backward(
        self, saved: tuple[Tensor, ...], grads: tuple[Tensor, ...], *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        spec = _with_parameters(self.spec, inputs[3:])
        return documents.backward(self.kernels, spec, *inputs[:3], *saved, *grads)  # type: ignore[arg-type]

    def definition(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        return definition(self.spec, *inputs)


def definition(spec: Spec, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """What kernels return for q, k, v and parameters, by every pair, in torch's own operators."""
    from foveate.attention.impl.reference import weigh  # an implementation, which all others are derived from

    spec = _with_parameters(spec, inputs[3:])
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in inputs[:3] if x is not None)
    mask = visible(spec.seen, q, k)
    out, lse = weigh(q, k, v, mask, spec)
    lse = q.new_zeros(q.shape[:3]) if lse is None else lse
    return out.to(inputs[0].dtype), lse.to(sums_dtype(q))  # type: ignore[union-attr]


def _with_parameters(spec: Spec, parameters: Sequence[Tensor | None]) -> Spec:
    """The spec with parameters that autograd has kept for it, and has seen to be unchanged."""
    pairs = zip(spec.biases, parameters, strict=True)
    return spec._replace(biases=tuple(replace(bias, parameter=p) for bias, p in pairs if p is not None))


def visible(seen: Seen, q: Tensor, k: Tensor) -> Tensor:
    """The dense mask (B or 1, H, N, M) of what was selected."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    if isinstance(seen, documents.ByDocument):
        return documents.visible(seen, q, k)
    if isinstance(seen, Band):
        place = torch.arange(num_queries, device=q.device) + num_keys - num_queries
        distance = place.unsqueeze(1) - torch.arange(num_keys, device=q.device)
        return ((seen.low <= distance) & (distance <= seen.high)).expand(1, q.shape[1], -1, -1)
    if isinstance(seen, Windows):
        pattern = neighborhood(seen.size, dilation=seen.dilation, causal=seen.causal)
        mask = pattern.mask(num_queries, layout=Grid(*seen.dims)).to(q.device)
    else:
        mask = seen.to_dense().clone()  # a selection may have been kept since inference mode
    return mask.repeat_interleave(q.shape[1] // mask.shape[1], dim=1)
