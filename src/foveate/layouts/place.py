"""Where tokens live: which document a key slot belongs to, and which position it has there.

A pattern of positions means positions in the document. Padding, packed documents and caches that have dropped
their first keys move tokens to other slots; a :class:`Place` says where each came from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

NOWHERE = -1  # document of a slot that holds no token

Slots = slice | Tensor


class Document(NamedTuple):
    """Tokens that are alone with one another: of these batch entries these key slots, in order."""

    batch: slice
    slots: Slots
    first: int  # position of the first token; above 0 where a cache has dropped those before it
    is_consecutive: bool  # whether the others follow it one by one

    def queries(self, offset: int) -> Slots:
        """The queries among these tokens, where query i is the token of key slot ``i + offset``."""
        if isinstance(self.slots, slice):
            return slice(max(self.slots.start - offset, 0), max(self.slots.stop - offset, 0))
        return self.slots[self.slots >= offset] - offset


@dataclass(frozen=True, eq=False)
class Place:
    """Document and position of each key slot, (B or 1, M) int64; query i is the token of key slot ``i + offset``."""

    document: Tensor
    position: Tensor
    given: bool = False  # whether positions were told rather than counted

    @classmethod
    def counted(cls, document: Tensor) -> Place:
        """Positions counted from 0 in each document, slots that hold no token left out.

        >>> Place.counted(torch.tensor([[0, 0, -1, 0, 7, 7]])).position
        tensor([[ 0,  1, -1,  2,  0,  1]])
        """
        order = torch.argsort(document, dim=1, stable=True)
        ordered = document.gather(1, order)
        slot = torch.arange(document.shape[1], device=document.device).expand_as(document)
        begins = torch.ones_like(ordered, dtype=torch.bool)
        begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        first = torch.where(begins, slot, 0).cummax(1).values if document.shape[1] else slot
        position = torch.empty_like(document).scatter_(1, order, slot - first)
        return cls(document, torch.where(document == NOWHERE, NOWHERE, position))

    def also(self, other: Place) -> Place:
        """Tokens that share a document in both; positions are counted anew, unless they were told and still hold."""
        document, others = torch.broadcast_tensors(self.document, other.document)
        many = int(others.max()) + 2 if others.numel() else 1
        joint = torch.where((document == NOWHERE) | (others == NOWHERE), NOWHERE, document * many + others)
        for place in (self, other):
            if place.given and not place._is_split_by(joint):
                return Place(joint, torch.where(joint == NOWHERE, NOWHERE, place.position), given=True)
        return Place.counted(joint)

    def _is_split_by(self, joint: Tensor) -> bool:
        """Whether tokens of one document lie in several of these."""
        own = self.document.expand_as(joint)
        entry = torch.arange(len(joint), device=joint.device).unsqueeze(1).expand_as(joint)
        numbers = torch.stack([entry, own, joint])[:, joint != NOWHERE]
        return numbers.unique(dim=1).shape[1] != numbers[:2].unique(dim=1).shape[1]

    @property
    def num_slots(self) -> int:
        return self.document.shape[1]

    @cached_property
    def stretches(self) -> Tensor:
        """A number, ascending, for each run of slots with consecutive positions of one document, (B or 1, M)."""
        step = torch.where(self.document[:, 1:] == NOWHERE, 0, 1)
        breaks = (self.document.diff(dim=1) != 0) | (self.position.diff(dim=1) != step)
        return pad(breaks.long(), (1, 0)).cumsum(1) if self.num_slots else torch.empty_like(self.document)

    @cached_property
    def keeps_distances(self) -> bool:
        """Whether positions of a document are as far apart as their slots."""
        return all(isinstance(document.slots, slice) for document in self.documents)

    @cached_property
    def is_consecutive(self) -> bool:
        """Whether every document is its first position and those that follow it, in order."""
        return all(document.is_consecutive for document in self.documents)

    @cached_property
    def ascends(self) -> bool:
        """Whether positions rise along the slots of every document."""
        document, order = torch.sort(self.document, dim=1, stable=True)
        falls = self.position.gather(1, order).diff(dim=1) <= 0
        return not bool((falls & (document.diff(dim=1) == 0) & (document[:, 1:] != NOWHERE)).any())

    @cached_property
    def documents(self) -> list[Document]:
        """Every document; neighbouring batch entries with equal ones share them, as all do in a place for all."""
        with torch.inference_mode(False):  # they are kept, and may have to serve calls that want gradients
            return self._listed()

    def _listed(self) -> list[Document]:
        if len(self.document) == 1:
            return [Document(slice(None), *each) for each in _documents_of(self.document[0], self.position[0])]
        rows = [list(_documents_of(*row)) for row in zip(self.document, self.position, strict=True)]
        found: list[Document] = []
        entry = 0
        for _, group in groupby(zip(self._row_numbers(), rows, strict=True), key=lambda pair: pair[0]):
            same = [row for _, row in group]
            batch = slice(entry, entry + len(same))
            found += [Document(batch, *each) for each in same[0]]
            entry += len(same)
        return found

    def _row_numbers(self) -> list[int]:
        """Equal numbers for neighbouring batch entries that are equal."""
        changes = (self.document[1:] != self.document[:-1]).any(1) | (self.position[1:] != self.position[:-1]).any(1)
        return [0, *changes.cumsum(0).tolist()] if len(self.document) else []

    def row(self, batch: Tensor | int) -> Tensor | int:
        """Row of the tables for a batch entry."""
        return batch if len(self.document) > 1 else 0


def _documents_of(document: Tensor, position: Tensor) -> Iterator[tuple[Slots, int, bool]]:
    """Slots, first position and whether the others follow, of the documents of one batch entry, by their first slot."""
    slots = torch.nonzero(document != NOWHERE).squeeze(1)
    slots = slots[torch.argsort(document[slots], stable=True)]
    counts = torch.unique_consecutive(document[slots], return_counts=True)[1]
    ends = counts.cumsum(0)
    firsts, lasts = slots[ends - counts], slots[ends - 1]
    begins = position[firsts]
    follows = pad((position[slots].diff() == 1).long(), (1, 0)).cumsum(0)  # steps of one up to each token
    consecutive = follows[ends - 1] - follows[ends - counts] + 1 == counts
    whole = (lasts - firsts + 1 == counts) & consecutive
    numbers = zip(*(each.tolist() for each in (firsts, lasts, ends, counts, begins, consecutive, whole)), strict=True)
    for first, last, end, count, begin, is_consecutive, is_whole in sorted(numbers):
        yield slice(first, last + 1) if is_whole else slots[end - count : end], begin, is_consecutive
