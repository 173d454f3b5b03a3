"""Static patterns of a text with images in it: what heads of a vision-language model need of either."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from foveate.patterns.algebra import Bounds, Boxes, Index, Pattern
from foveate.patterns.rules.sequence import distances, same_group

HeadClass = Literal["dense", "sink", "document", "document_sink"]


@dataclass(frozen=True, eq=False, repr=False)
class ImageSegments(Pattern):
    """Text keys, and of images: their sinks, the query's own image, or all where the query is text; none ahead.

    ``images`` are (first position, tokens) of each, in order; every other position is text.
    """

    images: tuple[tuple[int, int], ...]
    kind: HeadClass
    sinks: int
    sees_future = False

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"image_segments({list(self.images)}, {self.kind!r}, {self.sinks})"

    @cached_property
    def edges(self) -> Tensor:
        """Where images begin and end, in turn."""
        edges = [edge for start, count in self.images for edge in (start, start + count)]
        return torch.tensor(edges, dtype=torch.long, device="cpu")

    @cached_property
    def sink_positions(self) -> Tensor:
        found = [start + i for start, count in self.images for i in range(min(self.sinks, count))]
        return torch.tensor(found, dtype=torch.long, device="cpu")

    def segment(self, position: Tensor) -> Tensor:
        """Number of the segment at each position: odd for images."""
        return torch.bucketize(position.contiguous(), self.edges.to(position.device), right=True)

    def is_sink(self, position: Tensor) -> Tensor:
        table = self.sink_positions.to(position.device)
        return self.count(table, position, position) > 0

    @staticmethod
    def count(table: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """How many of the sorted numbers lie in each closed range."""
        ends = torch.bucketize(high.contiguous(), table, right=True)
        return ends - torch.bucketize(low.contiguous(), table)

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        own, other = self.segment(q), self.segment(k)
        seen = other % 2 == 0
        if self.kind == "dense":
            seen = torch.ones_like(seen)
        if "document" in self.kind:
            seen = seen | (own == other)
        if self.kind == "document":
            seen = seen | (own % 2 == 0)
        if "sink" in self.kind:
            seen = seen | self.is_sink(k) | (q == k)
        return seen & (k <= q)

    def bounds(self, boxes: Boxes) -> Bounds:
        at = boxes.position
        q_lo, q_hi, k_lo, k_hi = (self.segment(edge) for edge in at)
        one = (k_lo == k_hi) & (k_lo % 2 == 0)
        some, every = (k_lo != k_hi) | one, one
        if self.kind == "dense":
            some = every = torch.ones_like(one)
        if "document" in self.kind:
            same = same_group(q_lo, q_hi, k_lo, k_hi)
            some, every = some | same.some, every | same.every
        if self.kind == "document":
            all_text = (q_lo == q_hi) & (q_lo % 2 == 0)
            some, every = some | (q_lo != q_hi) | all_text, every | all_text
        nearest, farthest = distances(at)
        if "sink" in self.kind:
            sunk = self.count(self.sink_positions.to(at.k_lo.device), at.k_lo, at.k_hi)
            diagonal = (nearest <= 0) & (farthest >= 0)
            some, every = some | (sunk > 0) | diagonal, every | (sunk == at.k_hi - at.k_lo + 1)
        return Bounds(some & (farthest >= 0), every & (nearest >= 0))


def image_segments(images: tuple[tuple[int, int], ...], kind: HeadClass, sinks: int = 1) -> Pattern:
    """What a head of a class sees of a text with images, given as (first position, tokens).

    All see the text before them. ``sink`` heads see of every image its first ``sinks`` tokens, ``document`` heads their
    own image, or all images where they read for text; ``document_sink`` heads their own image and the sinks of others.

    >>> image_segments(((1, 2), (4, 2)), "document").mask(7)[0, 0].int()[4:]
    tensor([[1, 0, 0, 1, 1, 0, 0],
            [1, 0, 0, 1, 1, 1, 0],
            [1, 1, 1, 1, 1, 1, 1]], dtype=torch.int32)

    Raises ValueError for images that overlap or hold no token, and for an unknown class.
    """
    placed = tuple(sorted((int(start), int(count)) for start, count in images))
    ends = [0, *(start + count for start, count in placed)]
    if any(start < end or count < 1 for (start, count), end in zip(placed, ends, strict=False)):
        raise ValueError(f"images are (first position, tokens) that do not overlap; got {list(placed)}")
    if kind not in ("dense", "sink", "document", "document_sink"):
        raise ValueError(f"heads are of class dense, sink, document or document_sink; got {kind!r}")
    return ImageSegments(placed, kind, sinks)
