"""When two patterns are the same."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from torch import Tensor


def fields_of(thing: object) -> dict[str, Any]:
    """What an object holds, in its dictionary and in its slots, without what it derived from that.

    >>> from foveate import sinks
    >>> fields_of(sinks(4))
    {'count': 4}
    """
    state = object.__getstate__(thing)  # type: ignore[attr-defined]
    kind: Any = type(thing)
    derived = _derived(kind)
    if type(state) is dict and derived.isdisjoint(state):
        return state
    parts = state if isinstance(state, tuple) else (state,)
    return {name: value for part in parts for name, value in (part or {}).items() if name not in derived}


@lru_cache(maxsize=1024)
def _derived(kind: type) -> frozenset[str]:
    """The names of a class's cached properties."""
    return frozenset(
        name for each in kind.__mro__ for name, value in vars(each).items() if isinstance(value, cached_property)
    )


def same(mine: object, theirs: object) -> bool:
    """Whether two fields are equal: tensors and arrays if they are one object, numbers only of one type.

    >>> same((2, 3), (2, 3)), same(2, 2.0)
    (True, False)
    """
    if mine is theirs:
        return True
    if type(mine) is not type(theirs) or isinstance(mine, (Tensor, np.ndarray)):
        return False
    if isinstance(mine, (tuple, list)) and isinstance(theirs, (tuple, list)):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return mine.keys() == theirs.keys() and all(same(value, theirs[name]) for name, value in mine.items())
    return (mine == theirs) is True
