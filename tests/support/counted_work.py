"""How much work a forward and its backward are, by an implementation in torch, whose operators can be counted."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from foveate.counting import count_operations
from foveate.options import forced_impl


def largest(call: Callable[[], Tensor]) -> int:
    """Elements of the largest tensor that a forward and its backward make."""
    with count_operations(inside=True) as counted:
        call().sum().backward()
    return counted.largest


def work(call: Callable[[], Tensor], impl: str = "chunks") -> int:
    """Products and numbers made."""
    with forced_impl(impl), count_operations(inside=True) as counted:
        call().sum().backward()
    return counted.flops + counted.elements
