"""Which of MInference's patterns suits which head, found offline under a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.attention import attend
from foveate.mixers.core import joined
from foveate.mixers.dynamic_sparse.a_shape import AShape
from foveate.patterns import Pattern, causal
from foveate.patterns.rules.dynamic import topk_blocks, vertical_slash


class HeadPattern(NamedTuple):
    """A pattern as the authors' configurations name it, and its sizes.

    ``kind`` is "stream_llm", the A-shape (first keys, window), "vertical_and_slash" (keys, distances) or
    "block_sparse" (blocks, of which ``slash`` says nothing).
    """

    kind: str
    vertical: int
    slash: int

    @classmethod
    def of(cls, one: Sequence[str | int]) -> HeadPattern:
        if isinstance(one, str) or len(one) != 3:
            raise ValueError(f"a head's pattern is its kind and two sizes; got {one!r}")
        kind, vertical, slash = one
        if kind not in KINDS or not isinstance(vertical, int) or not isinstance(slash, int) or min(vertical, slash) < 1:
            raise ValueError(f"a head's pattern is one of {', '.join(KINDS)} and two sizes of at least 1; got {one!r}")
        return cls(str(kind), vertical, slash)


KINDS = ("stream_llm", "vertical_and_slash", "block_sparse")
PUBLISHED = (  # what the authors' search tries
    HeadPattern("stream_llm", 100, 800),
    HeadPattern("vertical_and_slash", 30, 800),
    HeadPattern("vertical_and_slash", 100, 800),
    HeadPattern("vertical_and_slash", 100, 750),
    HeadPattern("vertical_and_slash", 500, 700),
    HeadPattern("vertical_and_slash", 3500, 100),
    HeadPattern("vertical_and_slash", 1000, 4096),
    HeadPattern("block_sparse", 100, 1),
)


def as_pattern(one: HeadPattern, *, block: int = 64, last: int = 64, first: int = 30, near: int = 30) -> Pattern:
    """What a head with that pattern sees; ``first`` keys and ``near`` distances at most are chosen whatever they weigh.

    >>> as_pattern(HeadPattern("vertical_and_slash", 100, 20))
    vertical_slash(100, 20, first=30, near=20)
    """
    kind, vertical, slash = one
    if kind == "stream_llm":
        return AShape.pattern(sinks=vertical, window=slash)
    if kind == "block_sparse":
        return topk_blocks(block, vertical, per="block")
    return vertical_slash(vertical, slash, last=last, first=min(first, vertical), near=max(min(near, slash), 1))


def width_under(budget: float, length: int) -> int:
    """Keys to a query, the same for all, that are a fraction of causal attention's pairs.

    Rows see min(i + 1, width) keys: n width - width (width - 1) / 2 pairs of n (n + 1) / 2.
    """
    if not 0 < budget <= 1 or length < 1:
        raise ValueError(f"a budget is a fraction in (0, 1], of a length of at least 1; got {budget}, {length}")
    half = length + 0.5
    return max(int(half - math.sqrt(half**2 - budget * length * (length + 1)) + 1e-9), 1)


def space_under(
    budget: float, length: int, *, space: Sequence[HeadPattern] = PUBLISHED, block: int = 64
) -> list[HeadPattern]:
    """The patterns of a search space with sizes changed, in their proportion, to one cost.

    Each sees at most the fraction ``budget`` of causal attention's pairs: a key or a distance is at most one pair to a
    query, a block ``block`` of them; blocks larger than the budget are left out. At a budget of 1 all see everything.

    >>> space_under(0.25, 8192)[0]
    HeadPattern(kind='stream_llm', vertical=122, slash=975)

    Raises ValueError unless 0 < budget <= 1 and length is at least 1.
    """
    width, found = width_under(budget, length), []
    for kind, vertical, slash in space:
        if kind == "block_sparse":
            if width < min(block, length):
                continue
            keys, distances = (width // block if width < length else -(-length // block)), 1
        elif width >= length:
            keys, distances = length, length
        else:
            keys = max(round(width * vertical / (vertical + slash)), 1)
            distances = max(width - keys, 1)
        found.append(HeadPattern(kind, keys, distances))
    return list(dict.fromkeys(found))


class HeadSearch(NamedTuple):
    """The best pattern of each head, and the relative error of each of the patterns tried (H, patterns)."""

    assignment: tuple[HeadPattern, ...]
    errors: Tensor
    tried: tuple[HeadPattern, ...]


@torch.no_grad()
def search_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    budget: float = 0.25,
    within: Pattern = causal,
    scale: float | None = None,
    block: int = 64,
    last: int = 64,
    first: int = 30,
    near: int = 30,
) -> HeadSearch:
    """The pattern under one budget that brings each head's output nearest to full attention on a sample.

    >>> q = k = v = torch.randn(1, 2, 65, 8)
    >>> len(search_heads(q, k, v, block=8).assignment)
    2

    q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv) are one layer's of a sample of real text; the other options are
    those of :func:`as_pattern`.
    """
    tried = space_under(budget, k.shape[2], block=block)
    exact = attend(q, k, v, within, scale=scale)
    size = exact.square().sum((0, 2, 3)).clamp_min(torch.finfo(exact.dtype).tiny)
    errors = []
    for one in tried:
        pattern = as_pattern(one, block=block, last=last, first=first, near=near)
        out = attend(q, k, v, joined(pattern, within), scale=scale)
        errors.append(((out - exact).square().sum((0, 2, 3)) / size).sqrt())
    table = torch.stack(errors, dim=1)
    return HeadSearch(tuple(tried[best] for best in table.argmin(1).tolist()), table, tuple(tried))
