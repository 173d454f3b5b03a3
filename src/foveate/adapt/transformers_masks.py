"""Masks of transformers as patterns.

transformers describes a mask by a function (batch, head, query, key) -> bool, put together from a few known
ones, and asks a registered "mask function" to build from it what the attention function wants. Ours builds a
pattern, and sends it through the model in the place of the mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.adapt.pattern_mask import PatternMask
from foveate.patterns import Pattern, causal, full, key_padding, window
from foveate.patterns.algebra import Index

IndexFunction = Callable[..., Tensor]


def pattern_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: IndexFunction | None = None,
    attention_mask: Tensor | PatternMask | None = None,
    cache_position: Tensor | None = None,
    device: Any = "cpu",
    **unused: Any,
) -> PatternMask:
    """The mask function for transformers, which until 5.0 told q's place by ``cache_position``."""
    if isinstance(attention_mask, PatternMask):
        return attention_mask
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    assert q_length is not None and mask_function is not None
    place = Place(batch_size, q_length, kv_length, int(q_offset), kv_offset)
    pattern, num_keys = _pattern(mask_function, place)
    return _carry(_with_padding(pattern, attention_mask, kv_offset, num_keys), num_keys, place, device)


@dataclass(frozen=True)
class Place:
    """Where queries and key slots stand in the text."""

    batch_size: int
    num_queries: int
    num_slots: int
    first_query: int
    first_key: int

    @property
    def empty_slots(self) -> int:
        """Key slots behind the last query: the unused part of a static cache."""
        return self.first_key + self.num_slots - self.first_query - self.num_queries


def _pattern(function: IndexFunction, place: Place) -> tuple[Pattern, int]:
    """The pattern of an index function, and how many of the keys it is about."""
    known = translated(function)
    if known is not None and (known == full or place.empty_slots == 0):
        return known, place.num_slots
    if known is not None and not known.sees_future and place.empty_slots > 0:
        return known, place.num_slots - place.empty_slots
    return MaskFunction(function, place, batches=place.batch_size), place.num_slots


def translated(function: IndexFunction) -> Pattern | None:
    """The pattern equal to one of transformers' own index functions, or None for one we do not know."""
    maker = getattr(function, "__qualname__", "").partition(".<locals>")[0]
    inside = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    match maker:
        case "causal_mask_function":
            return causal
        case "bidirectional_mask_function":
            return full
        case "sliding_window_bidirectional_overlay" if inside["sliding_window"] > 0:
            return window(inside["sliding_window"])
        case "and_masks":
            return _translated_and(inside["mask_functions"])
    return None


def _translated_and(functions: tuple[IndexFunction, ...]) -> Pattern | None:
    parts = [_overlay(function) or translated(function) for function in functions]
    if any(part is None for part in parts):
        return None
    if any(map(_overlay, functions)) and causal not in parts:
        return None
    patterns = [part for part in parts if part is not None and part != full]
    joined = patterns[0] if patterns else full
    for part in patterns[1:]:
        joined = joined & part
    return joined


def _overlay(function: IndexFunction) -> Pattern | None:
    """The window of a ``sliding_window_overlay``, which only means the same beside ``causal``."""
    if not function.__qualname__.startswith("sliding_window_overlay."):
        return None
    width = inspect.getclosurevars(function).nonlocals["sliding_window"]
    return window(width - 1) if width > 1 else None


@dataclass(frozen=True, eq=False, repr=False)
class MaskFunction(Pattern):
    """Any index function of transformers, asked pair by pair: packed sequences, chunks, image blocks, ..."""

    function: IndexFunction
    place: Place
    batches: int = 1
    itself: Tensor = field(default_factory=lambda: torch.empty(0))  # equal to no other, so never cached

    text = "mask_function(...)"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.itself,)

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        place = self.place
        last = place.num_slots - 1
        shift = place.first_query - (place.num_slots - place.num_queries)
        q, k = q.clamp(last - place.num_queries + 1, last) + shift, k.clamp(0, last) + place.first_key
        batch, head = torch.as_tensor(batch, device=q.device), torch.as_tensor(head, device=q.device)
        return self.function(batch, head, q, k)


def _with_padding(pattern: Pattern, mask: Tensor | None, first_key: int, num_keys: int) -> Pattern:
    """Leave out the keys that a 2-D mask (B, tokens so far) marks as padding."""
    if mask is None:
        return pattern
    mask = mask[:, first_key : first_key + num_keys].bool()
    mask = torch.nn.functional.pad(mask, (0, num_keys - mask.shape[1]))
    if mask.all():
        return pattern
    return key_padding(mask) if pattern == full else pattern & key_padding(mask)


def _carry(pattern: Pattern, num_keys: int, place: Place, device: Any) -> PatternMask:
    shape = (place.batch_size, 1, place.num_queries, place.num_slots)
    return PatternMask(pattern, num_keys, shape, device)
