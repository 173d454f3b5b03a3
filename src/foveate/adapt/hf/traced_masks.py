"""Index functions of transformers inside a graph of torch.compile, where nobody can look into a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.patterns import Pattern, boolean_mask, causal, full, window


def maker_of(function: Callable[..., Any]) -> str:
    """The name of an index function, or of the function that made it; also inside a graph."""
    code = getattr(function, "__code__", None)
    return "" if code is None else code.co_qualname.partition(".<locals>")[0]


def in_graph(function: Callable[..., Tensor], padded: bool, told: Mapping[str, Any]) -> Pattern | None:
    """The pattern of one of transformers' own index functions, by what its maker ``told``; None for a model's own.

    Documents packed in one row may lie around it: :func:`traced_documents` finds them, where only transformers' own
    functions hide a token's neighbour.
    """
    maker, size = maker_of(function), told.get("local_size")
    if maker == "causal_mask_function":
        return causal
    if maker == "bidirectional_mask_function":
        return full
    if maker != "and_masks":
        return None
    if told.get("use_vmap"):
        if padded:
            return None
        raise NotImplementedError(
            "what a model's own mask function hides cannot be told in a graph of torch.compile from documents packed "
            "in one row: pass an attention_mask (of ones), or use torch.export"
        )
    if size is None:
        return causal
    if "allow_is_bidirectional_skip" in told:
        return window(size)
    if size == getattr(told.get("config"), "attention_chunk_size", None):
        raise NotImplementedError("attention in chunks cannot be read by torch.compile; torch.export can")
    return window(size - 1) & causal if size > 1 else None


def traced_pattern(
    function: Callable[..., Tensor], batch_size: int, queries: tuple[int, int], keys: tuple[int, int]
) -> Pattern:
    """The pattern of an index function that is not known: its mask, written out in the graph.

    ``queries`` and ``keys`` are the first position and the number of each. It costs N M bits, and leaves no tile out.
    """
    q, k = (torch.arange(first, first + number) for first, number in (queries, keys))
    batch, head = torch.arange(batch_size).view(-1, 1, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    visible = function(batch, head, q.view(1, 1, -1, 1), k.view(1, 1, 1, -1))
    return boolean_mask(visible.expand(batch_size, 1, queries[1], keys[1]))


def traced_documents(function: Callable[..., Tensor], batch_size: int, length: int) -> Tensor | None:
    """Numbers (B, N) of the documents that may be packed in rows: one begins where a token does not see the last."""
    if maker_of(function) != "and_masks":
        return None
    at = torch.arange(1, length).view(1, 1, -1)
    batch = torch.arange(batch_size).view(-1, 1, 1)
    sees = function(batch, torch.zeros_like(batch), at, at - 1).expand(batch_size, 1, length - 1)
    return torch.nn.functional.pad((~sees[:, 0]).long().cumsum(1), (1, 0))
