"""What models carry about in the place of a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.adapt.hf.placed import Token
from foveate.layouts.kinds import Sequence
from foveate.patterns import Pattern
from foveate.patterns.algebra import Scene, resolve
from foveate.patterns.select.dense import dense_mask

# By the names of torch's functions and of Tensor's methods.
_OF_BOOLEANS = frozenset(
    {"where", "masked_fill", "logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not"}
    | {"all", "any", "cat", "stack", "expand_as", "broadcast_tensors"}
)


class PatternMask:
    """A pattern in the place of a (B, 1, N, M) mask of booleans; it takes no memory.

    ``num_keys`` is the number of leading keys to attend to: a static cache has empty slots behind them. A model that
    combines its mask with others gets the mask itself, dense; one that wants numbers to add is refused.
    """

    dtype, ndim, requires_grad = torch.bool, 4, False

    def __init__(self, pattern: Pattern, num_keys: int, shape: tuple[int, int, int, int], device: Any = "cpu") -> None:
        self.pattern, self.num_keys = pattern, num_keys
        self.shape, self.device = torch.Size(shape), device
        self.remembered: dict[int, tuple[Token, ...]] = {}  # by which swaps each layer attended under this mask

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self, *args: Any, **kwargs: Any) -> PatternMask:
        return self

    def to(self, *args: Any, **kwargs: Any) -> PatternMask:
        return self

    def dense(self) -> Tensor:
        """The mask itself, (B or 1, 1 or H, N, M)."""
        num_queries, num_slots = self.shape[2:]
        scene = Scene(num_queries, self.num_keys, Sequence())
        mask = dense_mask(resolve(self.pattern, scene), scene, torch.device(self.device))
        return torch.nn.functional.pad(mask, (0, num_slots - self.num_keys)).expand(self.shape[0], -1, -1, -1)

    def __getitem__(self, index: Any) -> Any:
        kept = isinstance(index, tuple) and all(
            part is Ellipsis or (isinstance(part, slice) and part.indices(size) == (0, size, 1))
            for part, size in zip(index, self.shape, strict=False)
        )
        return self if kept and Ellipsis not in index else self.dense()[index]

    def __and__(self, other: Tensor) -> Tensor:
        return self.dense() & other

    def __or__(self, other: Tensor) -> Tensor:
        return self.dense() | other

    def __invert__(self) -> Tensor:
        return ~self.dense()

    __rand__, __ror__ = __and__, __or__

    def bool(self) -> PatternMask:
        return self

    def masked_fill(self, *args: Any) -> Tensor:
        return self.dense().masked_fill(*args)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "").strip("_")
        if name not in _OF_BOOLEANS and name not in ("and", "or", "rand", "ror"):
            raise NotImplementedError(
                f"torch.{name} was given Foveate's mask, a pattern, which only Foveate's attention can read. Where "
                "this is the recomputation of a checkpointed layer, run backward before the mechanism is taken out"
            )
        return function(*(_dense(x) for x in args), **{key: _dense(x) for key, x in (kwargs or {}).items()})


def _dense(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)(map(_dense, x))
    return x.dense() if isinstance(x, PatternMask) else x
