"""One call of attend, checked and completed: what every implementation receives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.compiler import is_compiling

from foveate.attention.bias import Bias
from foveate.attention.biases import BiasLike, beside, checked
from foveate.attention.dropout import Dropout, as_dropout
from foveate.attention.gaps import place_biases
from foveate.attention.weights import Kind, Weights, as_weights
from foveate.patterns.algebra import Pattern
from foveate.patterns.layouts import Layout, Sequence

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Call:
    """q (B, H, N, D), k (B, G, M, D), v (B, Gv, M, Dv) and how to attend; a sink is applied by the caller."""

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Pattern
    biases: tuple[Bias, ...]
    kind: Kind
    scale: float
    softcap: float | None
    layout: Layout
    needs_lse: bool
    dropout: Dropout | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a kernel would read."""
        return (self.q, self.k, self.v, *(bias.parameter for bias in self.biases), *self.pattern.tensors)

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def num_queries(self) -> int:
        return self.q.shape[2]

    @property
    def num_keys(self) -> int:
        return self.k.shape[2]


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    bias: BiasLike,
    weights: Weights | str,
    scale: float | None,
    softcap: float | None,
    layout: Layout | None,
    needs_lse: bool,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Call, Tensor | None]:
    """The checked call, and the sink logits (H,) if there are any."""
    check_tensors(q, k, v)
    if not torch.compiler.is_compiling():
        q, k, v = q.resolve_neg(), k.resolve_neg(), v.resolve_neg()
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a Foveate pattern such as window(256) & causal; got {type(pattern).__name__}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be a positive finite number; got {softcap}")
    weights, layout, heads = as_weights(weights), layout or Sequence(), q.shape[1]
    layout.check(k.shape[2])
    biases = tuple(checked(bias, weights, q, k, pattern, layout))
    if not is_compiling():  # there the operator looks, which alone knows what masks hold
        biases, pattern = place_biases(biases, pattern, layout, q.shape[2], k.shape[2])
    if pattern.batches not in (1, q.shape[0]):
        raise ValueError(f"{pattern} is for a batch of {pattern.batches}, but q has {q.shape[0]}")
    if heads % pattern.heads:
        raise ValueError(f"{pattern} tells {pattern.heads} heads apart, which does not divide q's {heads} heads")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    sink = weights.sink
    if sink is not None:
        sink = beside(q, _on_heads("sink", sink, heads))
    needs_lse, dropped = needs_lse or sink is not None, as_dropout(dropout, seed)
    return Call(q, k, v, pattern, biases, weights.kind, scale, softcap, layout, needs_lse, dropped), sink


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse q, k, v that do not belong together."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor; got {tensor.layout}: pass {name}.to_dense()")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, length, dim); got shape {tuple(tensor.shape)}")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k, v must share one of float64, float32, bfloat16, float16; got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must be on one device; got {q.device}, {k.device}, {v.device}")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k, v must have one batch size; got {shapes}")
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"k and v must have one length; got {shapes}")
    if q.shape[3] != k.shape[3] or q.shape[3] == 0:
        raise ValueError(f"q and k must have one head dim of at least 1; got {shapes}")
    for name, tensor in (("key", k), ("value", v)):
        if tensor.shape[1] == 0 or q.shape[1] % tensor.shape[1]:
            raise ValueError(f"{name} heads must divide query heads; got {shapes}")


def _on_heads(name: str, values: Tensor, heads: int) -> Tensor:
    if values.numel() not in (1, heads):
        raise ValueError(f"{name} must be a number or one for each of the {heads} heads; got {values.numel()}")
    return values.expand(heads)
