"""Bytes that a cache holds: the memory behind every tensor that can be reached from it, each counted once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveate.cache.offload import HostTokens, Offloaded
from foveate.patterns import Pattern

OURS = ("foveate.", "transformers.")


class Held(NamedTuple):
    """Bytes on the model's device, and bytes put aside in the host's memory or in files."""

    device: int
    host: int


def held_bytes(cache: object, model: nn.Module) -> Held:
    """What a cache holds beyond the model itself: keys, values, scores, positions, and room made for more of them.

    >>> from transformers import DynamicCache
    >>> cache = DynamicCache()
    >>> _ = cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 0)
    >>> held_bytes(cache, nn.Linear(2, 2))
    Held(device=320, host=0)
    """
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    found: dict[int, tuple[int, bool]] = {}
    for tensor, aside in _tensors(cache, set(), False):
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            found[address] = (tensor.untyped_storage().nbytes(), aside)
    return Held(*(sum(size for size, aside in found.values() if aside is where) for where in (False, True)))


def _tensors(value: object, seen: set[int], aside: bool) -> Iterator[tuple[Tensor, bool]]:
    """Tensors that can be reached, and whether they lie in what is put aside."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value, aside
        return
    aside = aside or isinstance(value, (Offloaded, HostTokens))
    for inner in _inside(value):
        yield from _tensors(inner, seen, aside)


def _inside(value: object) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    if isinstance(value, (nn.Module, Pattern, torch.dtype)) or not type(value).__module__.startswith(OURS):
        return ()
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*vars(value).values()] if hasattr(value, "__dict__") and not slots else _with_slots(value, slots)


def _with_slots(value: object, slots: Iterable[str]) -> list[Any]:
    return [getattr(value, name) for name in slots if hasattr(value, name)] + list(
        getattr(value, "__dict__", {}).values()
    )
