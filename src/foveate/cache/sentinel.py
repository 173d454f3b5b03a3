"""Spans compressed into a sentinel token: which tokens see which, and a cache without closed spans."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention import attend
from foveate.cache.memory import LayerMemory, Look
from foveate.cache.slots import FREE
from foveate.patterns import boolean_mask

ORDINARY, BEGIN, END = 0, 1, 2


@dataclass(frozen=True)
class Marks:
    """What sentinels make of tokens, (B, S) each.

    ``kind`` is ORDINARY, BEGIN or END; ``span`` the place of the sentinel that began the token's span, -1 outside of
    spans; ``opened`` whether a span is open behind the token, and ``begun`` where the latest one began; ``count`` how
    many ordinary tokens there are up to it.
    """

    kind: Tensor
    span: Tensor
    opened: Tensor
    begun: Tensor
    count: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.kind, self.span, self.opened, self.begun, self.count

    def take(self, index: Tensor) -> Marks:
        """Those at (B, K)."""
        return Marks(*(one.gather(1, index) for one in self.tensors))

    def joined(self, other: Marks) -> Marks:
        return Marks(*(torch.cat(pair, 1) for pair in zip(self.tensors, other.tensors, strict=True)))

    @property
    def position(self) -> Tensor:
        """Positions that stand still on sentinels."""
        return (self.count - 1).clamp_min(0)


def marks_of(tokens: Tensor, place: Tensor, begin: Tensor, end: Tensor, last: Marks | None = None) -> Marks:
    """Marks of tokens (B, N) at places (B, N) of their texts (FREE: padding), after a token whose marks are ``last``.

    A span goes from a sentinel of ``begin`` to the next one of ``end``; an ``end`` without a beginning stands for
    nothing, and a further beginning inside a span is a token of it that nobody but its end sees.
    """
    real = place != FREE
    kind = (torch.isin(tokens, begin).long() * BEGIN + torch.isin(tokens, end).long() * END).masked_fill(~real, 0)
    zero = tokens.new_zeros(tokens.shape[0], 1)
    open_0, begun_0, count_0 = (zero, zero - 1, zero) if last is None else (last.opened, last.begun, last.count)
    at = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    latest = torch.where(kind != ORDINARY, at, -1).cummax(1).values  # sentinel up to each token
    opened = torch.where(latest < 0, open_0, (kind.gather(1, latest.clamp_min(0)) == BEGIN).long())
    before = torch.cat([open_0, opened], 1)[:, :-1]
    starts = (kind == BEGIN) & (before == 0)
    begun = torch.cat([begun_0, torch.where(starts, place, -1)], 1).cummax(1).values[:, 1:]
    inside = ((before == 1) | (kind == BEGIN)) & real
    count = count_0 + ((kind == ORDINARY) & real).long().cumsum(1)
    return Marks(kind, torch.where(inside, begun, -1), opened, begun, count)


def sees(q: Marks, k: Marks, q_place: Tensor, k_place: Tensor) -> Tensor:
    """Whether tokens (B, N) see tokens (B, M): (B, N, M).

    Ordinary tokens see ordinary ones outside of spans and of their own, and ends; an end sees its span alone, from the
    sentinel that began it; a beginning sees itself alone.
    """
    kind, span, place = (one.unsqueeze(1) for one in (k.kind, k.span, k_place))
    q_kind, q_span, at = (one.unsqueeze(2) for one in (q.kind, q.span, q_place))
    own = (span == q_span) & (q_span >= 0)
    of_ordinary = (kind == END) | ((kind == ORDINARY) & ((span < 0) | own))
    seen = ((q_kind == ORDINARY) & of_ordinary) | ((q_kind == END) & own)
    return (seen & (place < at) | (place == at)) & (place != FREE)


class SentinelMemory(LayerMemory):
    """A key-value cache in which a span is evicted once its end has read it: the end's key and value stay.

    Ren, Jia, Zhu, Context Compression for Auto-regressive Transformers with Sentinel Tokens, arXiv 2310.08152.
    """

    def __init__(self, begin: Tensor, end: Tensor) -> None:
        super().__init__()
        self.begin, self.end = begin, end
        self.marks: Marks | None = None  # of the slots

    def next_marks(self, look_tokens: Tensor | None, place: Tensor) -> Marks:
        """Marks of new tokens (B, N) at places (B, N)."""
        if look_tokens is None:
            raise ValueError("sentinels are told by their ids: call the model with input_ids, not with embeddings")
        begin, end = self.begin.to(place.device), self.end.to(place.device)
        return marks_of(look_tokens, place, begin, end, self._last())

    def _last(self) -> Marks | None:
        if self.marks is None or self.slots is None or not self.slots.count:
            return None
        return self.marks.take(self.slots.position[:, 0].argmax(1, keepdim=True))

    def add(self, k: Tensor, v: Tensor, look: Look) -> None:
        new = self.next_marks(look.tokens, look.position)
        self.marks = new if self.marks is None else self.marks.joined(new)
        super().add(k, v, look)

    def look(self, q: Tensor, look: Look) -> Tensor:
        assert self.slots is not None and self.marks is not None
        if self.is_whole and not self.marks.kind.any():
            return super().look(q, look)
        place, count = self.slots.position[:, 0], q.shape[2]
        of_queries = Marks(*(one[:, one.shape[1] - count :] for one in self.marks.tensors))
        seen = sees(of_queries, self.marks, look.position, place).unsqueeze(1)
        if look.width is not None:
            seen = seen & look.visible(self.slots.position[:, :1])
        return attend(q, self.slots.k, self.slots.v, boolean_mask(seen), **look.options_at(self.slots.position))

    def settle(self, q: Tensor, look: Look) -> None:
        assert self.slots is not None and self.marks is not None
        last = self._last()
        assert last is not None
        place, marks = self.slots.position[:, 0], self.marks
        still = (marks.span == last.begun) & (last.opened == 1)  # of the span that is open
        kept = (marks.kind == END) | ((marks.kind == ORDINARY) & (marks.span < 0)) | still
        gone = ~kept & (place != FREE)
        if not gone.any():
            return
        kept = kept & (place != FREE)
        index = (~kept).long().argsort(dim=1, stable=True)[:, : int(kept.sum(1).max())]
        over_heads = index.unsqueeze(1).expand(-1, self.slots.position.shape[1], -1)
        hidden = ~kept.gather(1, index).unsqueeze(1).expand_as(over_heads)
        self.slots, self.marks = self.slots.take(over_heads).freed(hidden), marks.take(index)

    def crop(self, count: int) -> None:
        if count and self.slots is not None and self.marks is not None:
            left = self.slots.count - count
            self.marks = Marks(*(one[:, :left] for one in self.marks.tensors))
        super().crop(count)

    def select(self, entries: Tensor) -> None:
        super().select(entries)
        if self.marks is not None:
            self.marks = Marks(*(one[entries.to(one.device)] for one in self.marks.tensors))
