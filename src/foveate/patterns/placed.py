"""Patterns inside documents: positions are those of the document, choices are taken in each alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.layouts.kinds import Layout
from foveate.layouts.place import NOWHERE, Document, Place, Slots
from foveate.patterns.algebra import Bounds, Boxes, Index, Interval, Pattern, Scene, mix_hash


def in_documents(leaf: Pattern, place: Place, scene: Scene) -> Pattern:
    """A leaf resolved in each document alone; itself where documents change nothing about it."""
    if not moves(leaf, place, scene):
        return leaf.resolve(scene)
    if not leaf.is_dynamic:
        return Placed(leaf.resolve(scene), place)
    chosen = tuple(leaf.resolve(_part_of(leaf, document, scene)) for document in place.documents)
    return Chosen(chosen, place)


def moves(leaf: Pattern, place: Place, scene: Scene) -> bool:
    """Whether a leaf says something else once its positions are those of documents."""
    if leaf.is_dynamic:
        return True
    if leaf.needs_axes or scene.layout.num_axes or leaf.depends_on == "slot":
        return False
    if leaf.depends_on == "order":
        return not place.ascends
    return not (leaf.depends_on == "distance" and place.keeps_distances)


def _part_of(leaf: Pattern, document: Document, scene: Scene) -> Scene:
    assert scene.q is not None and scene.k is not None
    q = taken(scene.q[document.batch], document.queries(scene.offset))
    k = taken(scene.k[document.batch], document.slots)
    check_complete(leaf, document, k.shape[2] - q.shape[2], scene.reach)
    return replace(scene, num_queries=q.shape[2], num_keys=k.shape[2], q=q, k=k, first=document.first)


def check_complete(leaf: Pattern, document: Document, offset: int, reach: int | None) -> None:
    """Refuse a choice among keys of which some that could be chosen are no longer there.

    ``offset`` queries of the document came before, and no query looks further back than ``reach``.
    """
    if leaf.is_dynamic and not document.is_consecutive:
        raise ValueError(f"{leaf} chooses among all keys of a text, but its positions tell that some are missing")
    if leaf.is_dynamic and document.first > 0 and (reach is None or offset < reach):
        raise ValueError(
            f"{leaf} chooses among all keys of a text, but its cache has dropped the first {document.first}: "
            "generate with a cache that keeps every key, such as past_key_values=DynamicCache()"
        )


def taken(x: Tensor, slots: Slots) -> Tensor:
    """Tokens of (B, H, N, D)."""
    return x[:, :, slots]


class InDocuments(Pattern):
    """Base: a pattern asked with key slots that answers by documents and positions."""

    place: Place

    @property
    def by_part(self) -> list[tuple[int, Pattern]]:
        """The resolved patterns it is made of, each with the first batch entry it holds for."""
        raise NotImplementedError

    @property
    def part_of_slot(self) -> Tensor:
        """The number of the pattern that holds at each key slot, (B or 1, M)."""
        raise NotImplementedError

    def at(self, batch: Index, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Document and position of a slot; a slot that does not exist is nowhere."""
        if not self.place.num_slots:
            return torch.full_like(slot, NOWHERE), torch.full_like(slot, NOWHERE)
        inside = slot.clamp(0, self.place.num_slots - 1)
        document, position = (table.to(slot.device) for table in (self.place.document, self.place.position))
        row = self.place.row(batch)
        return torch.where(inside == slot, document[row, inside], NOWHERE), position[row, inside]


@dataclass(frozen=True, eq=False, repr=False)
class Placed(InDocuments):
    """A resolved pattern of positions, the same for all documents."""

    whole: Pattern
    place: Place

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"placed({self.whole}, ...)"

    @property
    def batches(self) -> int:  # type: ignore[override]
        return max(self.whole.batches, len(self.place.document))

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.whole.heads

    @property
    def sees_future(self) -> bool:  # type: ignore[override]
        return self.whole.sees_future

    def spread(self, heads: int) -> Pattern:
        return replace(self, whole=self.whole.spread(heads))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.whole.tensors, self.place.document, self.place.position)

    @property
    def by_part(self) -> list[tuple[int, Pattern]]:
        return [(0, self.whole)]

    @property
    def part_of_slot(self) -> Tensor:
        return torch.zeros_like(self.place.document)

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        (q_document, q_at), (k_document, k_at) = self.at(batch, q), self.at(batch, k)
        same = (q_document == k_document) & (q_document != NOWHERE)
        return same & self.whole.visible(self._entry(batch), head, q_at, k_at)

    def bounds(self, boxes: Boxes) -> Bounds:
        """Those of the pattern where a box lies in one stretch of one document; else nothing is known."""
        moved, known, apart = self._moved(boxes)
        some, every = self.whole.bounds(moved)
        return Bounds(some=~apart & (some | ~known), every=known & ~apart & every)

    def signature(self, boxes: Boxes) -> Tensor:
        moved, known, _ = self._moved(boxes)
        own = mix_hash(boxes.batch, boxes.head, boxes.position.q_lo, boxes.position.k_lo)
        return torch.where(known, mix_hash(self.whole.signature(moved)), own)

    def _entry(self, batch: Index) -> Index:
        return batch if self.whole.batches > 1 else 0

    def _moved(self, boxes: Boxes) -> tuple[Boxes, Tensor, Tensor]:
        """The boxes in positions; whether both sides of one are stretches, and whether of different documents."""
        last = max(self.place.num_slots - 1, 0)
        edges = [edge.clamp(0, last) for edge in boxes.position]
        row, stretch = self.place.row(boxes.batch), self.place.stretches.to(edges[0].device)
        q_first, q_last, k_first, k_last = (stretch[row, edge] for edge in edges)
        exists = (edges[0] == boxes.position.q_lo) & (edges[1] == boxes.position.q_hi)
        known = exists & (q_first == q_last) & (k_first == k_last)
        (q_document, _), (k_document, _) = self.at(boxes.batch, edges[0]), self.at(boxes.batch, edges[2])
        apart = known & ((q_document != k_document) | (q_document == NOWHERE))
        position = Interval(*(self.at(boxes.batch, edge)[1] for edge in edges))
        entry = boxes.batch if self.whole.batches > 1 else torch.zeros_like(boxes.batch)
        return boxes._replace(batch=entry, position=position), known, apart


@dataclass(frozen=True, eq=False, repr=False)
class Chosen(InDocuments):
    """What a dynamic pattern chose in each document."""

    parts: tuple[Pattern, ...]  # one for each of the place's documents
    place: Place

    text = "chosen(...)"

    @property
    def batches(self) -> int:  # type: ignore[override]
        return max([len(self.place.document), *(part.batches for part in self.parts)])

    @property
    def heads(self) -> int:  # type: ignore[override]
        return max([part.heads for part in self.parts], default=1)

    @property
    def sees_future(self) -> bool:  # type: ignore[override]
        return any(part.sees_future for part in self.parts)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self.parts for tensor in part.tensors)

    def spread(self, heads: int) -> Pattern:
        return replace(self, parts=tuple(part.spread(heads) for part in self.parts))

    @property
    def by_part(self) -> list[tuple[int, Pattern]]:
        firsts = (document.batch.start or 0 for document in self.place.documents)
        return list(zip(firsts, self.parts, strict=True))

    @property
    def part_of_slot(self) -> Tensor:
        numbers = torch.zeros_like(self.place.document)
        for number, document in enumerate(self.place.documents):
            numbers[document.batch, document.slots] = number
        return numbers

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        (q_document, q_at), (k_document, k_at) = self.at(batch, q), self.at(batch, k)
        seen = (q_document == k_document) & False
        for document, part in zip(self.place.documents, self.parts, strict=True):
            first = document.batch.start or 0
            number = self.place.document[first, _first(document.slots)].to(q.device)
            entry = torch.as_tensor(batch, device=q.device)
            here = (q_document == number) & (k_document == number)
            if document.batch.stop is not None:
                here = here & (entry >= first) & (entry < document.batch.stop)
            if bool(here.any()):
                own = (entry - first).clamp(0, part.batches - 1)
                seen = seen | (here & part.visible(own, head, q_at, k_at))
        return seen


def _first(slots: Slots) -> int:
    return slots.start if isinstance(slots, slice) else int(slots[0])


def split(pattern: Pattern, layout: Layout, num_keys: int) -> tuple[Pattern, Place | None]:
    """What is asked inside documents, and where these lie; no place where neither pattern nor layout says so."""
    from foveate.patterns.compound import And, joined
    from foveate.patterns.rules.listed import place_of_lengths
    from foveate.patterns.rules.sequence import full

    lengths = layout.packed_lengths
    places = [] if lengths is None else [place_of_lengths(lengths, num_keys)]
    rest: list[Pattern] = []
    for part in pattern.parts if isinstance(pattern, And) else (pattern,):
        place = part.places_tokens(num_keys)
        if place is None:
            rest.append(part)
        else:
            places.append(place)
    return (joined(And, *rest) if len(rest) > 1 else rest[0] if rest else full), merged(places) if places else None


def merged(places: Sequence[Place]) -> Place:
    """Documents in which tokens share all of these."""
    joint = places[0]
    for place in places[1:]:
        joint = joint.also(place)
    return joint
