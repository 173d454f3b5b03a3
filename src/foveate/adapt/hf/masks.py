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
from torch.nn.functional import pad

from foveate.adapt.hf.pattern_mask import PatternMask
from foveate.adapt.hf.traced_masks import in_graph, maker_of, traced_documents, traced_pattern
from foveate.patterns import Pattern, blocks, boolean_mask, causal, full, key_padding, window
from foveate.patterns.algebra import Index
from foveate.patterns.rules.listed import DocumentNumbers

IndexFunction = Callable[..., Tensor]
REMAPPED = "remap_positions_for_packed_sequence"


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
    extent = Extent(batch_size, q_length, kv_length, int(q_offset), kv_offset)
    if torch.compiler.is_dynamo_compiling():
        known = in_graph(mask_function, attention_mask is not None, unused)
        may_be_packed = attention_mask is None and kv_length == q_length
        documents = traced_documents(mask_function, batch_size, q_length) if may_be_packed else None
        pattern, num_keys = _pattern(mask_function, known, extent)
    else:
        function, documents = _unpacked(mask_function)
        pattern, num_keys = _pattern(function, translated(function), extent)
    where = _numbered(documents) if documents is not None else _where(extent, num_keys, attention_mask, pattern)
    if where is not None:
        pattern = where if pattern == full else pattern & where
    shape = (batch_size, 1, q_length, kv_length)
    return PatternMask(pattern, num_keys, shape, device)


@dataclass(frozen=True)
class Extent:
    """Which queries and key slots of the text there are."""

    batch_size: int
    num_queries: int
    num_slots: int
    first_query: int
    first_key: int

    @property
    def empty_slots(self) -> int:
        """Key slots behind the last query: the unused part of a static cache."""
        return self.first_key + self.num_slots - self.first_query - self.num_queries


def _unpacked(function: IndexFunction) -> tuple[IndexFunction, Tensor | None]:
    """The index function of documents packed in rows, asked inside each, and their numbers (B, M)."""
    if maker_of(function) == "and_masks":
        functions = _inside(function)["mask_functions"]
        if [maker_of(each) for each in functions] == ["packed_sequence_mask_function", REMAPPED]:
            packed, remapped = map(_inside, functions)
            return remapped["mask_function"], packed["packed_sequence_mask"]
    return function, None


def _numbered(documents: Tensor) -> Pattern:
    return DocumentNumbers(documents.long())


def _where(extent: Extent, num_keys: int, mask: Tensor | None, pattern: Pattern) -> Pattern | None:
    """Where the keys stand in the text; None where they are all of it. A 2-D mask (B, tokens so far) marks padding."""
    first, last = extent.first_key, extent.first_key + num_keys
    if mask is None:
        return _later(torch.arange(first, last).unsqueeze(0)) if first else None
    real = pad(mask.bool(), (0, max(last - mask.shape[1], 0)))
    position, real = (real.cumsum(1) - 1)[:, first:last], real[:, first:last]
    is_compiling = torch.compiler.is_compiling()  # a graph cannot depend on what a mask says
    if not is_compiling and bool(real.all()):
        return _later(position) if int(position.max() if position.numel() else 0) >= num_keys else None
    if pattern == full and extent.num_queries != extent.num_slots:  # queries of another text than the keys
        return boolean_mask(real[:, None, None].expand(-1, -1, extent.num_queries, -1))
    return key_padding(real) if first == 0 else DocumentNumbers(torch.where(real, 0, -1), position)


def _later(position: Tensor) -> Pattern:
    """Keys of one text whose first ones are gone."""
    return DocumentNumbers(torch.zeros_like(position), position)


def _pattern(function: IndexFunction, known: Pattern | None, extent: Extent) -> tuple[Pattern, int]:
    """The pattern of an index function, ``known`` or not, and how many of the keys it is about."""
    if known is not None and (known == full or extent.empty_slots == 0):
        return known, extent.num_slots
    if known is not None and not known.sees_future and extent.empty_slots > 0:
        return known, extent.num_slots - extent.empty_slots
    if torch.compiler.is_compiling():
        queries, keys = (extent.first_query, extent.num_queries), (extent.first_key, extent.num_slots)
        return traced_pattern(function, extent.batch_size, queries, keys), extent.num_slots
    return MaskFunction(function, extent, batches=extent.batch_size), extent.num_slots


def _inside(function: IndexFunction) -> dict[str, Any]:
    return dict(inspect.getclosurevars(function).nonlocals) if inspect.isfunction(function) else {}


def translated(function: IndexFunction) -> Pattern | None:
    """The pattern equal to one of transformers' own index functions, or None for one we do not know."""
    inside = _inside(function)
    match maker_of(function):
        case "causal_mask_function":
            return causal
        case "bidirectional_mask_function":
            return full
        case "sliding_window_bidirectional_overlay" if inside["sliding_window"] > 0:
            return window(inside["sliding_window"])
        case "chunked_overlay":  # counts from the first token that is no padding, as positions do
            return blocks(inside["chunk_size"])
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
    if maker_of(function) != "sliding_window_overlay":
        return None
    width = _inside(function)["sliding_window"]
    return window(width - 1) if width > 1 else None


@dataclass(frozen=True, eq=False, repr=False)
class MaskFunction(Pattern):
    """Any index function of transformers, asked pair by pair: packed sequences, chunks, image blocks, ..."""

    function: IndexFunction
    extent: Extent
    batches: int = 1
    depends_on = "slot"
    itself: Tensor = field(default_factory=lambda: torch.empty(0))  # equal to no other, so never cached

    text = "mask_function(...)"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.itself,)

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        extent = self.extent
        last = extent.num_slots - 1
        shift = extent.first_query - (extent.num_slots - extent.num_queries)
        q, k = q.clamp(last - extent.num_queries + 1, last) + shift, k.clamp(0, last) + extent.first_key
        batch, head = torch.as_tensor(batch, device=q.device), torch.as_tensor(head, device=q.device)
        return self.function(batch, head, q, k)
