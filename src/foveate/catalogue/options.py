"""Options of a mechanism by name: which there are, and a sentence for one that there is not."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

UNKNOWN = re.compile(r"unexpected keyword argument '(\w+)'")
Made = TypeVar("Made")


def made(name: str, make: Callable[..., Made], options: Mapping[str, Any], *given: Any) -> Made:
    """What ``make`` makes for the mechanism of this name; a ValueError for an option that it does not have.

    >>> from foveate.catalogue import registry
    >>> row = registry.row("streaming_llm")
    >>> made(row.name, row.core, {"window": 64}).pattern
    sinks(4) | window(63, 0)
    >>> made(row.name, row.core, {"windw": 64})
    Traceback (most recent call last):
    ValueError: streaming_llm has no option 'windw'; it has sinks, window: did you mean 'window'?
    """
    try:
        return make(*given, **options)
    except TypeError as error:
        found = UNKNOWN.search(str(error))  # asked only now: some classes pass options on to others
        if found is None or found[1] not in options:
            raise
        known = options_of(make)[len(given) :]
        raise ValueError(f"{name} has no option {found[1]!r}; {_known(found[1], known)}") from None


def options_of(make: Callable[..., Any]) -> list[str]:
    """Names of what a function, or the constructor of a class and of those it builds on, takes.

    >>> options_of(lambda dim, *, window=3: None)
    ['dim', 'window']
    """
    kinds = make.__mro__ if isinstance(make, type) else ()
    makers = [vars(kind)["__init__"] for kind in kinds if "__init__" in vars(kind)] or [make]
    found: dict[str, None] = {}
    for maker in makers:
        accepted = inspect.signature(maker).parameters.values()
        named = [one.name for one in accepted if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        found |= dict.fromkeys(name for name in named if name != "self")
        if not any(one.kind is one.VAR_KEYWORD for one in accepted):
            break
    return list(found)


def _known(option: str, known: list[str]) -> str:
    if not known:
        return "it has none"
    near = difflib.get_close_matches(option, known, n=1)
    return f"it has {', '.join(known)}{f': did you mean {near[0]!r}?' if near else ''}"
