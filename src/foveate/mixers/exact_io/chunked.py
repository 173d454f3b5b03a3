"""Exact attention in chunks: the core of attention without quadratic memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar, Unpack

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from foveate.attention import attend_partial, merge
from foveate.attention.bias_part import part_of_bias
from foveate.attention.biases import placed, split_bias
from foveate.attention.dropout import as_dropout
from foveate.attention.partial import Partial, with_sink
from foveate.attention.weights import as_weights
from foveate.mixers.core import AttendOptions
from foveate.patterns import Pattern, Scene, Sequence, full
from foveate.patterns.part import Parts

Result = TypeVar("Result")


@dataclass(frozen=True)
class ChunkedCore:
    """Attention over all keys, a chunk of queries and a chunk of keys at a time, recomputed in backward.

    What has been summed so far, the running output and log-sum-exp of a chunk of queries, is all that is kept between
    chunks of keys; where there is one such chunk it is not recomputed, since kernels keep no more of it themselves. The
    sizes are those of the authors' code; a key chunk of None is the square root of the number of keys, as in the
    paper's analysis. Rabe and Staats, Self-attention Does Not Need O(n^2) Memory, arXiv 2112.05682.

    >>> q = k = v = torch.randn(1, 2, 9, 4)
    >>> ChunkedCore(query_chunk=4, key_chunk=2)(q, k, v).shape
    torch.Size([1, 2, 9, 4])
    """

    query_chunk: int = 1024
    key_chunk: int | None = 4096
    pattern: Pattern = full

    def __post_init__(self) -> None:
        if self.query_chunk < 1 or (self.key_chunk is not None and self.key_chunk < 1):
            raise ValueError(f"chunks hold at least 1 token; got {self.query_chunk} and {self.key_chunk}")

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, within: Pattern = full, **options: Unpack[AttendOptions]
    ) -> Tensor:
        weights, scale = as_weights(options.get("weights", "softmax")), options.get("scale")
        layout = options.get("layout") or Sequence()
        scene = Scene(q.shape[2], k.shape[2], layout, q.detach(), k.detach(), scale)
        parts = Parts.of(within, scene)
        added, functions = split_bias(options.get("bias"))
        biases = tuple(placed(one, scene.offset) for one in added)
        key_chunk = self.key_chunk or math.isqrt(k.shape[2])

        dropout = as_dropout(options.get("dropout", 0.0), options.get("seed"))  # one seed for all chunks

        def chunk_of(q: Tensor, k: Tensor, v: Tensor, at: slice, keys: slice) -> Partial:
            return attend_partial(
                q,
                k,
                v,
                parts.part(at, keys),
                bias=part_of_bias(biases, functions, at.start, first_key=keys.start),
                weights=replace(weights, sink=None),
                scale=scale,
                softcap=options.get("softcap"),
                dropout=dropout.p if dropout else 0.0,
                seed=dropout.seed if dropout else None,
                first=(at.start, keys.start),
            )

        def rows_of(q: Tensor, k: Tensor, v: Tensor, at: slice) -> Tensor:
            whole: Partial | None = None
            size = max(key_chunk, 1)  # split, whose gradient is one tensor; one of each slice would be as long as k
            ks, vs = ((x.split(size, 2) if x.shape[2] > size else (x,)) for x in (k, v))
            for keys in parts.worth(at, cuts(k.shape[2], key_chunk)):
                number = keys.start // size
                chunk = chunk_of(q, ks[number], vs[number], at, keys)
                whole = chunk if whole is None else merge([whole, chunk])
            assert whole is not None
            return (whole if weights.sink is None else with_sink(whole, weights.sink)).out

        def kept(at: slice) -> bool:
            """Whether its only chunk keeps as little as what is computed again would: kernels keep out and lse."""
            several = len(list(parts.worth(at, cuts(k.shape[2], key_chunk)))) > 1
            return not (several or functions or dropout or weights.normalise)

        pieces = zip(q.split(self.query_chunk, 2), cuts(q.shape[2], self.query_chunk), strict=True)
        rows = [(rows_of if kept(at) else partial(recomputed, rows_of))(some, k, v, at) for some, at in pieces]
        return torch.cat(rows, dim=2)


def cuts(length: int, chunk: int) -> Iterator[slice]:
    """Slices of at most ``chunk`` that cover ``length``; one empty slice where it is 0."""
    for start in range(0, max(length, 1), max(chunk, 1)):
        yield slice(start, min(start + max(chunk, 1), length))


def recomputed(function: Callable[..., Result], *inputs: object) -> Result:
    """Call a function; what backward needs of its insides is computed again there."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)
