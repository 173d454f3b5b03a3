"""Patterns that a function says: exact, and slow, as it is asked about every pair."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from foveate.patterns.algebra import Index, Pattern, Scene
from foveate.patterns.rules.sequence import positive

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
PAIRS = 2**20  # asked about at a time

_numbers = count(1)
_named: WeakValueDictionary[str, MaskMod] = WeakValueDictionary()


@dataclass(frozen=True, eq=False, repr=False)
class ByFunction(Pattern):
    function: MaskMod
    name: str  # no other function of this process ever has it
    batches: int = 1
    heads: int = 1
    depends_on = "slot"

    may_change = True  # whatever else the function reads
    slow_because = "its function is asked about every pair, at every call"

    @property
    def text(self) -> str:  # type: ignore[override]
        counts = (f", {name}={getattr(self, name)}" for name in ("batches", "heads") if getattr(self, name) > 1)
        return f'mask_mod("{self.name}"{"".join(counts)})'

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.function, self.batches, self.heads)  # names are those of one process

    def resolve(self, scene: Scene) -> Pattern:
        lengths = getattr(self.function, "lengths", None)  # of one that holds for these numbers of tokens alone
        if lengths not in (None, (scene.num_queries, scene.num_keys)):
            raise ValueError(
                f"{self} is of a mask for {lengths[0]} queries and {lengths[1]} keys; got {scene.num_queries} and"
                f" {scene.num_keys}"
            )
        return self

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        places = [torch.as_tensor(x, device=q.device) for x in (batch, head, q, k)]
        shape = torch.broadcast_shapes(*(x.shape for x in places))
        places = [x.view((1,) * (len(shape) - x.dim()) + x.shape) for x in places]
        if shape.numel() <= PAIRS or shape[0] <= 1:
            return self._asked(places, shape)
        rows = max(PAIRS // shape[1:].numel(), 1)
        starts = range(0, shape[0], rows)
        parts = [[x if x.shape[0] == 1 else x[start : start + rows] for x in places] for start in starts]
        return torch.cat([self._asked(part, torch.broadcast_shapes(*(x.shape for x in part))) for part in parts])

    def _asked(self, places: list[Tensor], shape: torch.Size) -> Tensor:
        """What the function says of each pair; it is only ever given numbers, one batch of them a dim (vmap)."""
        if 0 in shape:
            return torch.zeros(shape, dtype=torch.bool, device=places[2].device)
        ask = self._checked
        for dim in reversed(range(len(shape))):
            if shape[dim] > 1:
                ask = torch.vmap(ask, in_dims=tuple(0 if x.shape[dim] > 1 else None for x in places))
        with ThreadPoolExecutor(1) as thread:  # a fresh one: inside an operator of torch's dispatcher vmap is off
            return thread.submit(ask, *(x.squeeze() for x in places)).result().view(shape)

    @torch.no_grad()
    def _checked(self, *place: Tensor) -> Tensor:
        seen = self.function(*place)
        if not isinstance(seen, Tensor) or seen.dtype != torch.bool or seen.dim():
            kind = f"{seen.dtype} {tuple(seen.shape)}" if isinstance(seen, Tensor) else repr(seen)
            raise TypeError(f"the function of {self} must return one boolean tensor of no dims; got {kind}")
        return seen


def mask_mod(function: MaskMod | str, *, batches: int = 1, heads: int = 1) -> Pattern:
    """Whatever a function says, as FlexAttention's ``mask_mod``: ``function(b, h, q_idx, kv_idx)`` is a boolean.

    The four are whole numbers (tensors of no dims); ``q_idx`` counts as everywhere here, the last query meets
    the last key. It is asked about every pair, in chunks, at every call, since it may read what changes: exact,
    and as slow as dense. Join it with a pattern (``window(256) & mask_mod(f)``), and it is asked only where that
    leaves a tile undecided. ``batches`` and ``heads`` say how many of them the function tells apart: with 1 it
    is asked for entry 0 alone.

    >>> mask_mod(lambda b, h, q_idx, kv_idx: q_idx % 2 == kv_idx % 2).mask(3)[0, 0].int()
    tensor([[1, 0, 1],
            [0, 1, 0],
            [1, 0, 1]], dtype=torch.int32)

    It prints under a name that :func:`foveate.parse` reads while the function lives. Raises ValueError for a
    name of no living function, TypeError for what is not callable.
    """
    batches, heads = positive("mask_mod", "batches", batches), positive("mask_mod", "heads", heads)
    if isinstance(function, str):
        found = _named.get(function)
        if found is None:
            raise ValueError(f"mask_mod takes a function; there is none named {function!r} in this process")
        return ByFunction(found, function, batches, heads)
    if not callable(function):
        raise TypeError(f"mask_mod takes function(b, h, q_idx, kv_idx); got {function!r}")
    return ByFunction(function, _name(function), batches, heads)


def _name(function: MaskMod) -> str:
    for name, known in list(_named.items()):
        if known is function:
            return name
    name = f"{getattr(function, '__name__', type(function).__name__).strip('<>')}#{next(_numbers)}"
    _named[name] = function
    return name


def _again(function: MaskMod, batches: int, heads: int) -> Pattern:
    return mask_mod(function, batches=batches, heads=heads)
