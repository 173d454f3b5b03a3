"""Padding between two tokens of one text: biases by distance count positions, not the slots in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from foveate.attention.bias import Alibi, Bias, LogDecay, RelativeTable
from foveate.layouts.kinds import Layout
from foveate.layouts.place import Place
from foveate.patterns.algebra import Index, Pattern
from foveate.patterns.placed import split
from foveate.patterns.rules.listed import document_numbers


@dataclass(frozen=True, eq=False)
class Positioned(Bias):
    """A bias by distance, asked with slots; query i is the token of key slot ``i + offset``."""

    whole: Alibi | RelativeTable
    place: Place
    offset: int

    def values(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        whole = replace(self.whole, parameter=self.parameter)
        return whole.values(batch, head, self._at(batch, q + self.offset), self._at(batch, k))

    def add_grad(self, total: Tensor, grad: Tensor, batch: Index, head: Index, q: Tensor, k: Tensor) -> None:
        whole = replace(self.whole, parameter=self.parameter)
        whole.add_grad(total, grad, batch, head, self._at(batch, q + self.offset), self._at(batch, k))

    def _at(self, batch: Index, slot: Tensor) -> Tensor:
        """Positions; those of padding mean nothing."""
        inside = slot.clamp(0, self.place.num_slots - 1)
        return self.place.position.to(slot.device)[self.place.row(batch), inside] + (slot - inside)

    def in_documents(self, place: Place) -> bool:
        return True

    def moved(self, parameter: Tensor, offset: int) -> Bias:
        return replace(self.whole, parameter=parameter, offset=offset)


def place_biases(
    biases: Sequence[Bias], pattern: Pattern, layout: Layout, num_queries: int, num_keys: int
) -> tuple[tuple[Bias, ...], Pattern]:
    """Where padding lies between tokens: biases by distance told where these stand, and a pattern that says it too."""
    if not by_distance(biases):
        return tuple(biases), pattern
    place = gaps_in(pattern, layout, num_keys, decays=any(isinstance(bias, LogDecay) for bias in biases))
    if place is None:
        return tuple(biases), pattern
    placed = tuple(_placed(bias, place, num_keys - num_queries) for bias in biases)
    return placed, pattern & document_numbers(place.document, place.position)


def by_distance(biases: Sequence[Bias]) -> bool:
    """Whether what lies between two tokens could change a bias."""
    return any(isinstance(bias, (Alibi, LogDecay, RelativeTable)) for bias in biases)


def gaps_in(pattern: Pattern, layout: Layout, num_keys: int, *, decays: bool) -> Place | None:
    """Where tokens stand, if padding lies between some of them; refused where log decays would count it."""
    place = None if layout.num_axes else split(pattern, layout, num_keys)[1]
    if place is None or place.keeps_distances:
        return None
    if decays:
        raise ValueError("log_decay adds up the gates of padding that lies between two tokens of a text: remove it")
    return place


def placed_at(bias: Bias, position: Tensor, offset: int) -> Bias:
    """A bias that reads the position (B, M) of each key slot, if it is one by distance."""
    return _placed(bias, Place(position, position), offset)


def _placed(bias: Bias, place: Place, offset: int) -> Bias:
    if isinstance(bias, (Alibi, RelativeTable)) and not getattr(bias, "dims", ()):
        return Positioned(bias.parameter, replace(bias, offset=0), place, offset)
    return bias
