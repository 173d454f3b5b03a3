"""Patterns made of patterns: ``a & b``, ``a | b``, ``~a`` and ``per_head([a, b])``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from foveate.layouts.place import Place
from foveate.patterns.algebra import Bounds, Boxes, Index, Pattern, Scene, mix_hash
from foveate.patterns.placed import Placed, in_documents, merged, moves
from foveate.patterns.rules.sequence import Window, full

EMPTY, FILLED = -1, -2  # signatures of settled boxes


class Compound(Pattern):
    """A pattern made of parts."""

    __slots__ = ("parts", "text")
    parts: tuple[Pattern, ...]

    def __init__(self, parts: tuple[Pattern, ...]) -> None:
        self.parts = parts
        self.text = self._write()
        for name in ("batches", "heads"):
            counts = {getattr(part, name) for part in parts} - {1}
            if len(counts) > 1:
                raise ValueError(f"{self.text} joins patterns for different numbers of {name}: {sorted(counts)}")

    def _write(self) -> str:
        raise NotImplementedError

    @property
    def batches(self) -> int:  # type: ignore[override]
        return max(part.batches for part in self.parts)

    @property
    def heads(self) -> int:  # type: ignore[override]
        return max(part.heads for part in self.parts)

    @property
    def is_dynamic(self) -> bool:  # type: ignore[override]
        return any(part.is_dynamic for part in self.parts)

    @property
    def needs_axes(self) -> bool:  # type: ignore[override]
        return any(part.needs_axes for part in self.parts)

    @property
    def sees_future(self) -> bool:  # type: ignore[override]
        return any(part.sees_future for part in self.parts)

    @property
    def chooses_ahead(self) -> bool:  # type: ignore[override]
        return any(part.chooses_ahead for part in self.parts)

    @property
    def counts_queries(self) -> bool:  # type: ignore[override]
        return any(part.counts_queries for part in self.parts)

    @property
    def may_change(self) -> bool:  # type: ignore[override]
        return any(part.may_change for part in self.parts)

    @property
    def slow_because(self) -> str | None:  # type: ignore[override]
        return next((part.slow_because for part in self.parts if part.slow_because), None)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self.parts for tensor in part.tensors)

    def resolve(self, scene: Scene) -> Pattern:
        return type(self)(even(part.resolve(scene) for part in self.parts))

    def placed(self, place: Place, scene: Scene) -> Pattern:
        """Resolved inside documents."""
        return type(self)(even(placed(part, place, scene) for part in self.parts))

    def spread(self, heads: int) -> Pattern:
        return self if self.heads == 1 else type(self)(tuple(part.spread(heads) for part in self.parts))

    def looking_back(self) -> Pattern:
        return type(self)(tuple(part.looking_back() for part in self.parts)) if self.is_dynamic else self

    def signature(self, boxes: Boxes) -> Tensor:
        return mix_hash(*(settled_signature(part, boxes) for part in self.parts))


class And(Compound):
    """``a & b``: visible where every part is."""

    __slots__ = ()

    def _write(self) -> str:
        return " & ".join(f"({p.text})" if isinstance(p, Or) else p.text for p in self.parts)

    @property
    def sees_future(self) -> bool:  # type: ignore[override]
        return all(part.sees_future for part in self.parts)

    @property
    def chooses_ahead(self) -> bool:  # type: ignore[override]
        return any(part.chooses_ahead for part in self._choosing)

    @property
    def _choosing(self) -> tuple[Pattern, ...]:
        """The parts as they choose beside one another: among earlier keys where one of them hides all later ones."""
        narrows = self.is_dynamic and not self.sees_future
        return tuple(part.looking_back() for part in self.parts) if narrows else self.parts

    def resolve(self, scene: Scene) -> Pattern:
        """Parts that say where tokens live place the others; see :meth:`Pattern.places_tokens`."""
        scene = replace(scene, reach=reach_of(self.parts, scene.reach))
        places = [place for part in self.parts if (place := part.places_tokens(scene.num_keys)) is not None]
        if places:
            return self._inside(merged(places), scene)
        return And(even(part.resolve(scene) for part in self._choosing))

    def placed(self, place: Place, scene: Scene) -> Pattern:
        scene = replace(scene, reach=reach_of(self.parts, scene.reach))
        own = [inner for part in self.parts if (inner := part.places_tokens(scene.num_keys)) is not None]
        return self._inside(merged([place, *own]), scene)

    def _inside(self, place: Place, scene: Scene) -> Pattern:
        """Resolved inside documents; where that changes anything, queries that are padding see nothing."""
        parts = even(placed(part, place, scene) for part in self._choosing)
        changed = any(moves(leaf, place, scene) for part in self.parts for leaf in leaves(part))
        return And((*parts, Placed(full, place)) if changed else parts)

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        seen = self.parts[0].visible(batch, head, q, k)
        for part in self.parts[1:]:
            seen = seen & part.visible(batch, head, q, k)
        return seen

    def bounds(self, boxes: Boxes) -> Bounds:
        some, every = self.parts[0].bounds(boxes)
        for part in self.parts[1:]:
            more = part.bounds(boxes)
            some, every = some & more.some, every & more.every
        return Bounds(some, every)


class Or(Compound):
    """``a | b``: visible where at least one part is."""

    __slots__ = ()

    def _write(self) -> str:
        return " | ".join(p.text for p in self.parts)

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        seen = self.parts[0].visible(batch, head, q, k)
        for part in self.parts[1:]:
            seen = seen | part.visible(batch, head, q, k)
        return seen

    def bounds(self, boxes: Boxes) -> Bounds:
        some, every = self.parts[0].bounds(boxes)
        for part in self.parts[1:]:
            more = part.bounds(boxes)
            some, every = some | more.some, every | more.every
        return Bounds(some, every)


class Not(Compound):
    """``~a``: visible where the part is not."""

    __slots__ = ()

    def __init__(self, part: Pattern | tuple[Pattern, ...]) -> None:
        super().__init__(part if isinstance(part, tuple) else (part,))

    def looking_back(self) -> Pattern:
        return self

    def _write(self) -> str:
        (part,) = self.parts
        return f"~({part})" if isinstance(part, (And, Or)) else f"~{part}"

    @property
    def sees_future(self) -> bool:  # type: ignore[override]
        return True

    def resolve(self, scene: Scene) -> Pattern:
        return super().resolve(replace(scene, layout=scene.layout.inverted()))

    def placed(self, place: Place, scene: Scene) -> Pattern:
        return super().placed(place, replace(scene, layout=scene.layout.inverted()))

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return ~self.parts[0].visible(batch, head, q, k)

    def bounds(self, boxes: Boxes) -> Bounds:
        some, every = self.parts[0].bounds(boxes)
        return Bounds(some=~every, every=~some)


class PerHead(Compound):
    """Another pattern for each head."""

    __slots__ = ()

    def __init__(self, parts: tuple[Pattern, ...]) -> None:
        if any(part.heads not in (1, len(parts)) for part in parts):
            raise ValueError("a pattern inside per_head must hold for one head or tell apart all of them")
        super().__init__(parts)

    def _write(self) -> str:
        return f"per_head([{', '.join(p.text for p in self.parts)}])"

    @property
    def heads(self) -> int:  # type: ignore[override]
        return len(self.parts)

    def spread(self, heads: int) -> Pattern:
        times = heads // len(self.parts)
        return PerHead(tuple(part for part in self.parts for _ in range(times)))

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        if isinstance(head, int):
            return self.parts[head].visible(batch, head, q, k)
        seen = self.parts[0].visible(batch, head, q, k)
        for number, part in enumerate(self.parts[1:], start=1):
            seen = torch.where(head == number, part.visible(batch, head, q, k), seen)
        return seen

    def bounds(self, boxes: Boxes) -> Bounds:
        some, every = self.parts[0].bounds(boxes)
        for number, part in enumerate(self.parts[1:], start=1):
            own, here = part.bounds(boxes), boxes.head == number
            some, every = torch.where(here, own.some, some), torch.where(here, own.every, every)
        return Bounds(some, every)

    def signature(self, boxes: Boxes) -> Tensor:
        signature = settled_signature(self.parts[0], boxes)
        for number, part in enumerate(self.parts[1:], start=1):
            own = settled_signature(part, boxes)
            settled = (own == EMPTY) | (own == FILLED)
            named = torch.where(settled, own, mix_hash(own, torch.full_like(own, self.parts.index(part))))
            signature = torch.where(boxes.head == number, named, signature)
        return signature


def per_head(patterns: list[Pattern] | tuple[Pattern, ...]) -> Pattern:
    """Another pattern for each query head, in order.

    >>> from foveate import causal, window
    >>> per_head([window(16), window(64)]) & causal
    per_head([window(16), window(64)]) & causal

    Raises ValueError on an empty list, TypeError on anything that is not a pattern.
    """
    parts = tuple(patterns)
    if not parts:
        raise ValueError("per_head takes one pattern for each head; got an empty list")
    for part in parts:
        if not isinstance(part, Pattern):
            raise TypeError(f"per_head takes patterns such as window(64); got {part!r}")
    return parts[0] if len(parts) == 1 else PerHead(parts)


def even(parts: Iterable[Pattern]) -> tuple[Pattern, ...]:
    """Resolved patterns that tell apart as many heads as one another: some choose for groups of heads."""
    found = tuple(parts)
    heads = math.lcm(*(part.heads for part in found))
    return found if {part.heads for part in found} <= {1, heads} else tuple(part.spread(heads) for part in found)


def placed(part: Pattern, place: Place, scene: Scene) -> Pattern:
    """A pattern resolved inside documents."""
    return part.placed(place, scene) if isinstance(part, Compound) else in_documents(part, place, scene)


def reach_of(parts: Iterable[Pattern], most: int | None) -> int | None:
    """How far back a query may look at most where all of these hold; None without a limit."""
    limits = [part.left for part in parts if isinstance(part, Window)] + ([] if most is None else [most])
    return min(limits, default=None)


def leaves(pattern: Pattern) -> Iterator[Pattern]:
    """The patterns a pattern is made of."""
    for part in pattern.parts if isinstance(pattern, Compound) else ():
        yield from leaves(part)
    if not isinstance(pattern, Compound):
        yield pattern


def settled_signature(part: Pattern, boxes: Boxes) -> Tensor:
    """A part's signature, coarsened where its bounds already settle the box as empty or full."""
    some, every = part.bounds(boxes)
    signature = part.signature(boxes)
    signature = torch.where(some, signature, torch.full_like(signature, EMPTY))
    return torch.where(every, torch.full_like(signature, FILLED), signature)


def joined(kind: type[Compound], *patterns: Pattern) -> Compound:
    """Nested parts of one kind as one list, so that ``(a | b) | c`` equals ``a | (b | c)``."""
    parts: list[Pattern] = []
    for pattern in patterns:
        parts.extend(pattern.parts if isinstance(pattern, Compound) and type(pattern) is kind else (pattern,))
    return kind(tuple(parts))
