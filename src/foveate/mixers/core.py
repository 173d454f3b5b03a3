"""Cores: attention on given queries, keys and values, without parameters of its own.

A core is what a training-free method is: it can take the place of the attention inside any pretrained model,
and inside a mixer it is surrounded by projections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, Unpack

from torch import Tensor

from foveate.attention import Weights, attend
from foveate.attention.biases import BiasLike, placed, split_bias
from foveate.patterns import Layout, Pattern, Sequence, full
from foveate.patterns.placed import split


class CoreOptions(TypedDict, total=False):
    """How a core attends beside what it looks at: as in :func:`foveate.attend`, whose defaults hold."""

    bias: BiasLike
    weights: Weights | str
    scale: float | None
    softcap: float | None
    layout: Layout | None


class AttendOptions(CoreOptions, total=False):
    """The same of cores that drop weights while training."""

    dropout: float
    seed: int | Tensor | None


class Core(Protocol):
    """Callable on q (B, H, N, D), k (B, G, M, D), v (B, Gv, M, Dv); returns (B, H, N, Dv).

    ``pattern`` is what it looks at; ``within`` is what the model lets it look at (causality, padding, the model's
    own window), and no core sees beyond that.
    """

    @property
    def pattern(self) -> Pattern: ...

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, within: Pattern = full, **options: Unpack[CoreOptions]
    ) -> Tensor: ...


@dataclass(frozen=True)
class PatternCore:
    """Exact attention over a pattern.

    >>> import torch
    >>> from foveate import causal, window
    >>> q = k = v = torch.randn(1, 2, 9, 4)
    >>> PatternCore(window(4))(q, k, v, within=causal).shape
    torch.Size([1, 2, 9, 4])
    """

    pattern: Pattern = full

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, within: Pattern = full, **options: Unpack[AttendOptions]
    ) -> Tensor:
        return attend(q, k, v, joined(self.pattern, within), **options)


@dataclass(frozen=True)
class PromptCore:
    """A core for several queries at a time; a query alone is one that is being written, and attends exactly.

    >>> import torch
    >>> from foveate import causal, window
    >>> q = k = v = torch.randn(1, 2, 9, 4)
    >>> core = PromptCore(PatternCore(window(1)))
    >>> bool((core(q[:, :, -1:], k, v, within=causal) == core(q, k, v, within=causal)[:, :, -1:]).all())
    False
    """

    prompt: Core

    @property
    def pattern(self) -> Pattern:
        return self.prompt.pattern

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, within: Pattern = full, **options: Unpack[CoreOptions]
    ) -> Tensor:
        core = PatternCore() if q.shape[2] == 1 else self.prompt
        return core(q, k, v, within=within, **options)


def joined(pattern: Pattern, within: Pattern) -> Pattern:
    """``pattern & within`` without needless parts."""
    if within == full:
        return pattern
    return within if pattern == full else pattern & within


def one_by_one(
    core: Core,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    within: Pattern,
    bias: BiasLike = None,
    layout: Layout | None = None,
    **options: Any,
) -> Tensor | None:
    """A core on every document as if it were alone, padding as zeros; None where there is but one document."""
    rest, place = split(within, layout or Sequence(), k.shape[2])
    if place is None:
        return None
    offset = k.shape[2] - q.shape[2]
    added, functions = split_bias(bias)
    if functions:
        raise ValueError("score functions are asked with the slots of the whole call, not of each document alone")
    wholes = [placed(one, offset) for one in added]
    for whole in wholes:
        if not whole.in_documents(place):
            raise ValueError(f"this bias does not say what each document alone is given: {type(whole).__name__}")
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for document in place.documents:
        if document.first:
            raise ValueError(f"{core} needs the first {document.first} keys of a text, which its cache has dropped")
        queries, keys = ((document.batch, slice(None), at) for at in (document.queries(offset), document.slots))
        if (own := q[queries]).shape[2]:
            parts = []
            for whole in wholes:
                parameter = whole.of_document(whole.parameter, document.batch, queries[2], keys[2])
                parts.append(whole.moved(parameter, k[keys].shape[2] - own.shape[2]))
            out[queries] = core(own, k[keys], v[keys], within=rest, bias=tuple(parts), **options)
    return out
