"""Static patterns that are others, joined: each says which once it knows how many tokens there are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from foveate.counts import whole_numbers
from foveate.patterns.algebra import Pattern, Scene
from foveate.patterns.rules.decided import Columns
from foveate.patterns.rules.listed import Documents
from foveate.patterns.rules.sequence import Prefix, positive


class Derived(Pattern):
    """Base: a name for patterns joined."""

    depends_on = "slot"

    def meaning(self, scene: Scene) -> Pattern:
        """The patterns that it stands for, joined."""
        raise NotImplementedError

    def resolve(self, scene: Scene) -> Pattern:
        return self.meaning(scene).resolve(scene)


@dataclass(frozen=True, eq=False, repr=False)
class DocumentPrefix(Derived):
    lengths: tuple[int, ...]
    prefix_lengths: tuple[int, ...]

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"document_prefix({list(self.lengths)}, {list(self.prefix_lengths)})"

    def meaning(self, scene: Scene) -> Pattern:
        starts = accumulate(self.lengths[:-1], initial=0)
        spans = [(start, count) for start, count in zip(starts, self.prefix_lengths, strict=True)]
        return Documents(self.lengths) & _marked(spans, scene)


def document_prefix(lengths: Iterable[int], prefix_lengths: Iterable[int]) -> Pattern:
    """The first keys of the query's own document, ``prefix_lengths[d]`` of them in document d.

    Documents lie end to end with these lengths, so ``causal & documents(lengths) | document_prefix(lengths,
    prefix_lengths)`` packs several prefix language models.

    >>> document_prefix([3, 2], [2, 1]).mask(5)[0, 0].int()
    tensor([[1, 1, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [0, 0, 0, 1, 0],
            [0, 0, 0, 1, 0]], dtype=torch.int32)

    Raises ValueError unless there is one prefix for each document, none longer than it.
    """
    lengths, prefixes = _whole("document_prefix", lengths), _whole("document_prefix", prefix_lengths)
    if len(lengths) != len(prefixes) or any(part > of for part, of in zip(prefixes, lengths, strict=True)):
        raise ValueError(
            "document_prefix takes one prefix for each document, none longer than it;"
            f" got documents of {list(lengths)} and prefixes of {list(prefixes)} tokens"
        )
    return DocumentPrefix(lengths, prefixes)


@dataclass(frozen=True, eq=False, repr=False)
class SharedPrefix(Derived):
    prefix: int
    lengths: tuple[int, ...]

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"shared_prefix({self.prefix}, {list(self.lengths)})"

    def meaning(self, scene: Scene) -> Pattern:
        return Documents((self.prefix, *self.lengths)) | Prefix(self.prefix)


def shared_prefix(prefix: int, lengths: Iterable[int]) -> Pattern:
    """One prompt of ``prefix`` tokens laid first, then its continuations: each sees the prompt and itself.

    Join it with ``& causal`` for language models. Positions for a rotary encoding start again at ``prefix``
    in each continuation.

    Juravsky et al., Hydragen: High-Throughput LLM Inference with Shared Prefixes, arXiv 2402.05099.

    >>> from foveate import causal
    >>> (shared_prefix(2, [1, 2]) & causal).mask(5)[0, 0].int()
    tensor([[1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 0, 1, 0],
            [1, 1, 0, 1, 1]], dtype=torch.int32)
    """
    return SharedPrefix(positive("shared_prefix", "prefix", prefix), _whole("shared_prefix", lengths))


@dataclass(frozen=True, eq=False, repr=False)
class Spans(Derived):
    spans: tuple[tuple[int, int], ...]  # first token and number of tokens, ascending

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"spans({list(self.spans)})"

    def meaning(self, scene: Scene) -> Pattern:
        cuts = [0]
        for start, count in self.spans:
            cuts += [start, start + count]
        lengths = tuple(end - start for start, end in pairwise(cuts))
        return Documents(lengths) & _marked(self.spans, scene)


def spans(spans: Iterable[tuple[int, int]]) -> Pattern:
    """Keys of the query's own span, given as (first token, number of tokens); tokens between spans see nothing.

    ``causal | spans(images)`` lets text look back and the tokens of each image see one another, as in
    Zhou et al., Transfusion: Predict the Next Token and Diffuse Images with One Multi-Modal Model,
    arXiv 2408.11039.

    >>> from foveate import causal
    >>> (causal | spans([(1, 2)])).mask(4)[0, 0].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 1, 0],
            [1, 1, 1, 0],
            [1, 1, 1, 1]], dtype=torch.int32)

    Raises ValueError for spans that overlap, or that hold no token.
    """
    placed = tuple(sorted((start, count) for start, count in (whole_numbers("spans", span) for span in spans)))
    ends = [0, *(start + count for start, count in placed)]
    if not placed or any(start < end or count < 1 for (start, count), end in zip(placed, ends, strict=False)):
        raise ValueError(f"spans takes (first token, tokens) of spans that do not overlap; got {list(placed)}")
    return Spans(placed)


def _whole(pattern: str, lengths: Iterable[int]) -> tuple[int, ...]:
    values = whole_numbers(f"whole lengths that {pattern} takes", lengths)
    if not values:
        raise ValueError(f"{pattern} takes whole lengths, at least one; got []")
    return values


def _marked(spans: Iterable[tuple[int, int]], scene: Scene) -> Pattern:
    """The keys of these spans, for every query."""
    marks = torch.zeros(1, 1, scene.num_keys, dtype=torch.bool, device=None if scene.k is None else scene.k.device)
    for start, count in spans:
        marks[..., start : start + count] = True
    return Columns.of(marks)
