"""A pattern as some of the queries and some of the keys see it, for operators that work in parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.patterns.algebra import Bounds, Boxes, Index, Interval, Pattern, Scene, resolve
from foveate.plain import traced


@dataclass(frozen=True, eq=False, repr=False)
class Part(Pattern):
    """A resolved pattern, asked with the positions of a part.

    Query i of the part is the whole's query at position ``first_query + step * i``, key j its key
    ``first_key + j``. ``offset`` is the position of the part's query 0 among the part's keys.
    """

    whole: Pattern
    name: str
    first_query: int
    step: int
    first_key: int
    offset: int

    @property
    def text(self) -> str:  # type: ignore[override]
        where = f"{self.first_query}+{self.step}i-{self.offset}, {self.first_key}+j"
        return f"part({self.name}, {where})"

    @property
    def batches(self) -> int:  # type: ignore[override]
        return self.whole.batches

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.whole.heads

    def spread(self, heads: int) -> Pattern:
        return replace(self, whole=self.whole.spread(heads))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.whole.tensors

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return self.whole.visible(batch, head, self._query(q), k + self.first_key)

    def bounds(self, boxes: Boxes) -> Bounds:
        return super().bounds(boxes) if self.whole.needs_axes else self.whole.bounds(self._moved(boxes))

    def signature(self, boxes: Boxes) -> Tensor:
        if self.step > 1 or self.whole.needs_axes:
            return super().signature(boxes)
        return self.whole.signature(self._moved(boxes))

    def _query(self, q: Tensor) -> Tensor:
        return self.first_query + (q - self.offset) * self.step

    def _moved(self, boxes: Boxes) -> Boxes:
        at = boxes.position
        keys = (at.k_lo + self.first_key, at.k_hi + self.first_key)
        return boxes._replace(position=Interval(self._query(at.q_lo), self._query(at.q_hi), *keys))


@dataclass(frozen=True, eq=False)
class Parts:
    """Cuts parts out of one pattern on one scene.

    >>> from foveate import causal
    >>> from foveate.patterns.part import Parts
    >>> every_other = Parts.of(causal, Scene(5, 5)).part(slice(0, 5, 2), slice(0, 5))
    >>> every_other.mask(3, 5)[0, 0].int()
    tensor([[1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 1, 1]], dtype=torch.int32)
    """

    whole: Pattern
    name: str
    scene: Scene

    @classmethod
    def of(cls, pattern: Pattern, scene: Scene) -> Parts:
        """Resolve a pattern; every choice it takes from q and k is taken here, on the whole of them."""
        with torch.no_grad():
            return cls(resolve(pattern, scene), f"{pattern} on {scene.layout}", scene)

    def worth(self, queries: slice, chunks: Iterable[slice]) -> list[slice]:
        """The chunks of keys of which these queries may see any; the first of all where they see none."""
        chunks = list(chunks)
        return [keys for keys in chunks if self._shows(queries, keys)] or chunks[:1]

    def _shows(self, queries: slice, keys: slice) -> bool:
        if self.whole.needs_axes or traced(self.scene.q):  # numbers that are not there cannot be looked at
            return True
        device = None if self.scene.q is None else self.scene.q.device
        rows = torch.arange(self.whole.batches * self.whole.heads, device=device)
        first, last = queries.start + self.scene.offset, queries.stop - 1 + self.scene.offset
        box = Interval(*(torch.full_like(rows, at) for at in (first, last, keys.start, keys.stop - 1)))
        boxes = Boxes(rows // self.whole.heads, rows % self.whole.heads, box)
        return bool(self.whole.bounds(boxes).some.any())

    def part(self, queries: slice, keys: slice) -> Pattern:
        """The pattern for the queries and keys of these slices, for a call on no others."""
        rows = range(*queries.indices(self.scene.num_queries))
        columns = range(*keys.indices(self.scene.num_keys))
        assert columns.step == 1
        first = rows.start + self.scene.offset
        return Part(self.whole, self.name, first, rows.step, columns.start, len(columns) - len(rows))
