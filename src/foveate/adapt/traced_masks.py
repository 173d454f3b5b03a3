"""Index functions of transformers inside a graph of torch.compile, where nobody can look into a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.patterns import Pattern, boolean_mask, causal, full


def maker_of(function: Callable[..., Any]) -> str:
    """The name of an index function, or of the function that made it; also inside a graph."""
    code = getattr(function, "__code__", None)
    return "" if code is None else code.co_qualname.partition(".<locals>")[0]


def traced_pattern(
    function: Callable[..., Tensor], batch_size: int, queries: tuple[int, int], keys: tuple[int, int]
) -> Pattern:
    """The pattern of an index function: known by its name, else its mask, written out in the graph.

    ``queries`` and ``keys`` are the first position and the number of each. What the function holds (the width of a
    window, say) cannot be read in a graph: the mask costs N M bits there, and leaves no tile out.
    """
    if maker_of(function) == "causal_mask_function":
        return causal
    if maker_of(function) == "bidirectional_mask_function":
        return full
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
