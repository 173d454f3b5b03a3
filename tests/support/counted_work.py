"""How much work a call is, counted while it runs: every number an operator makes, and the products of matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from foveate.options import forced_impl


class Made(TorchDispatchMode):
    """Counts the elements of everything that operators return, and of the largest of these."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self.numel += each.numel()
                self.largest = max(self.largest, each.numel())
        return out


def largest(call: Callable[[], Tensor]) -> int:
    """Elements of the largest tensor that a forward and its backward make."""
    with Made() as made:
        call().sum().backward()
    return made.largest


def work(call: Callable[[], Tensor], impl: str | None = "chunks") -> int:
    """Of a forward and its backward, by an implementation in torch, whose operators can be counted."""
    with forced_impl(impl), FlopCounterMode(display=False) as products, Made() as made:
        call().sum().backward()
    return products.get_total_flops() + made.numel
