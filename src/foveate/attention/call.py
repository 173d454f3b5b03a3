"""One call of attend, checked and completed: what every implementation receives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention.bias import Bias
from foveate.attention.biases import BiasLike, beside, checked, split_bias
from foveate.attention.dropout import Dropout, as_dropout
from foveate.attention.gaps import place_biases
from foveate.attention.normalise import Entmax, Normalise, QRSquared, Sinkhorn
from foveate.attention.score import ScoreFunction
from foveate.attention.weights import Kind, Weights, as_weights
from foveate.layouts.kinds import Layout, Sequence
from foveate.patterns.algebra import Pattern
from foveate.plain import traced
from foveate.precision import accum_dtype

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
    functions: tuple[ScoreFunction, ...] = ()
    normalise: Normalise | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that an implementation would read."""
        parameters = [bias.parameter for bias in self.biases] + [x for f in self.functions for x in f.tensors]
        if isinstance(self.normalise, Entmax) and isinstance(self.normalise.alpha, Tensor):
            parameters.append(self.normalise.alpha)
        return (self.q, self.k, self.v, *parameters, *self.pattern.tensors)

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
    scale: float | Tensor | None,
    softcap: float | None,
    layout: Layout | None,
    needs_lse: bool,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    first: tuple[int, int] = (0, 0),
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
    if layout.batches not in (1, q.shape[0]):
        raise ValueError(f"{layout} is for a batch of {layout.batches}, but q has {q.shape[0]}")
    added, functions = split_bias(bias)
    biases = tuple(checked(added, weights, q, k, pattern, layout))
    if weights.normalise is not None:
        _check_normalised(weights, q, k, pattern, needs_lse, bool(added))
    parameters = (one.parameter for one in biases)
    if not traced(q, k, v, *parameters, *pattern.tensors):  # there operators look, which alone know what masks hold
        biases, pattern = place_biases(biases, pattern, layout, q.shape[2], k.shape[2])
    if pattern.batches not in (1, q.shape[0]):
        raise ValueError(f"{pattern} is for a batch of {pattern.batches}, but q has {q.shape[0]}")
    if heads % pattern.heads:
        raise ValueError(f"{pattern} tells {pattern.heads} heads apart, which does not divide q's {heads} heads")
    q, scale = scaled(q, scale)
    sink = weights.sink
    if sink is not None:
        sink = beside(q, _on_heads("sink", sink, heads))
    needs_lse, dropped = needs_lse or sink is not None, as_dropout(dropout, seed, first)
    how = (weights.kind, scale, softcap, layout, needs_lse, dropped, functions, weights.normalise)
    return Call(q, k, v, pattern, biases, *how), sink


def scaled(q: Tensor, scale: float | Tensor | None) -> tuple[Tensor, float]:
    """Queries and the factor on their products; a factor for each query goes into the queries."""
    if not isinstance(scale, Tensor):
        return q, q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not scale.is_floating_point() or scale.device not in (q.device, torch.device("cpu")):
        raise TypeError(f"scale is a number or a float tensor on {q.device}; got {scale.dtype} on {scale.device}")
    if scale.device != q.device and scale.dim():
        raise ValueError(f"scale must be on {q.device}, as q is; got {scale.device}")
    each = scale.reshape(()) if scale.numel() == 1 else scale
    want = tuple(q.shape[:3])
    if each.dim() and (each.dim() != 3 or any(x not in (1, n) for x, n in zip(each.shape, want, strict=True))):
        raise ValueError(f"scale is a number, or (B or 1, H or 1, N or 1) = {want}; got {tuple(scale.shape)}")
    precise = accum_dtype(q, scale)
    return (q.to(precise) * each.unsqueeze(-1)).to(q.dtype), 1.0


def _check_normalised(weights: Weights, q: Tensor, k: Tensor, pattern: Pattern, needs_lse: bool, biased: bool) -> None:
    if needs_lse:
        raise ValueError(f"{weights.kind} weights over parts of the keys do not merge: call attend on the whole")
    if isinstance(weights.normalise, Entmax) and isinstance(weights.normalise.alpha, Tensor):
        _on_heads("alpha", weights.normalise.alpha, q.shape[1])
    if isinstance(weights.normalise, (Sinkhorn, QRSquared)):
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"{weights.kind} takes as many queries as keys; got {q.shape[2]} and {k.shape[2]}")
        if not pattern.sees_future:
            raise ValueError(
                f"{weights.kind} normalises over all queries, later ones too, so {pattern} would not be causal"
            )
    if isinstance(weights.normalise, QRSquared) and not biased and q.shape[2] > q.shape[3]:
        raise ValueError(
            f"qr_squared takes logits of full rank: {q.shape[2]} tokens need as many channels of a head, not"
            f" {q.shape[3]}"
        )


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
