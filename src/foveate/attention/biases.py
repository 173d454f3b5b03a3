"""What a call adds to its logits: one bias or several, checked and placed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from foveate.attention.bias import Alibi, Bias, Dense, LogDecay, PerHead, RelativeTable
from foveate.attention.score import ScoreFunction
from foveate.attention.weights import Weights
from foveate.layouts.kinds import Layout
from foveate.patterns.algebra import Pattern
from foveate.patterns.rules.beside import Beside
from foveate.precision import accum_dtype

OneBias = Tensor | Bias | ScoreFunction
BiasLike = OneBias | Sequence[OneBias] | None


def as_tuple(bias: BiasLike) -> tuple[OneBias, ...]:
    """None, one bias or several as a tuple."""
    if bias is None:
        return ()
    return tuple(bias) if isinstance(bias, (list, tuple)) else (cast(OneBias, bias),)


def split_bias(bias: BiasLike) -> tuple[tuple[Tensor | Bias, ...], tuple[ScoreFunction, ...]]:
    """What is added to the logits, and the functions of their sum."""
    given = as_tuple(bias)
    functions = tuple(one for one in given if isinstance(one, ScoreFunction))
    return tuple(one for one in given if not isinstance(one, ScoreFunction)), functions


def placed(bias: Tensor | Bias, offset: int) -> Bias:
    """A bias that knows that query 0 sits at position ``offset`` of the keys."""
    if isinstance(bias, Tensor):
        return Dense(bias[(None,) * (4 - bias.dim())] if bias.dim() < 4 else bias)
    if isinstance(bias, (Alibi, LogDecay, RelativeTable)):
        return replace(bias, offset=offset)
    if isinstance(bias, Bias):
        return bias
    raise TypeError(
        "bias must be a tensor, alibi(...), relative_table(...), log_decay(...) or score_function(...), or a list of"
        f" such; got {type(bias).__name__}"
    )


def checked(
    given: Iterable[Tensor | Bias], weights: Weights, q: Tensor, k: Tensor, pattern: Pattern, layout: Layout
) -> list[Bias]:
    """The biases of a call, those of its weights included."""
    biases = [_precise(placed(one, k.shape[2] - q.shape[2]), q) for one in given]
    if weights.bias is not None:
        biases.append(PerHead(beside(q, weights.bias)))
    for one in biases:
        _check(one, q, k, pattern, layout)
    return biases


def beside(q: Tensor, values: Tensor) -> Tensor:
    """Numbers on q's device; float64 ones are kept beside float64 queries only."""
    narrow = values.dtype == torch.float64 and q.dtype != torch.float64
    return values.to(q.device, torch.float32 if narrow else values.dtype)


def total(biases: Iterable[Bias]) -> Tensor:
    """The sum of dense biases, (B or 1, H or 1, N or 1, M or 1), in float32 at least where there are several."""
    parameters = [bias.parameter for bias in biases]
    summed = parameters[0]
    for parameter in parameters[1:]:
        dtype = accum_dtype(summed, parameter)
        summed = summed.to(dtype) + parameter
    return summed


def _precise(bias: Bias, q: Tensor) -> Bias:
    if not isinstance(bias, Alibi):
        return bias
    dtype = accum_dtype(bias.parameter, q)
    return replace(bias, parameter=bias.parameter.to(dtype))  # distances are no numbers of half precision


def _check(bias: Bias, q: Tensor, k: Tensor, pattern: Pattern, layout: Layout) -> None:
    parameter = bias.parameter
    if isinstance(bias, RelativeTable) and bias.dims and isinstance(layout, Beside):
        raise ValueError(f"a relative table over a grid has no entry for the other tokens of {layout}: pass a tensor")
    if isinstance(bias, LogDecay) and pattern.sees_future:
        raise ValueError(f"log_decay looks back only, but {pattern} shows later keys: join it with & causal")
    if parameter.layout is not torch.strided:
        raise TypeError(f"a bias is a dense tensor; got {parameter.layout}: pass it through .to_dense()")
    if not parameter.is_floating_point() or parameter.device != q.device:
        raise ValueError(f"a bias is a float tensor on {q.device}; got {parameter.dtype} on {parameter.device}")
    bias.check(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
