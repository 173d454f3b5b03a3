"""Options of a mechanism by name: which there are, and a sentence for one that there is not."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, Unpack, get_args, get_origin

UNKNOWN = re.compile(r"unexpected keyword argument '(\w+)'")
Made = TypeVar("Made")
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


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
    return list(parameters_of(make))


def parameters_of(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters of a function or of a class's constructor, by name, with those that its ``**options`` stand for.

    These are those of the constructors it builds on, and where it writes ``**options: Unpack[Some]``, ``Some`` being a
    TypedDict, those that ``Some`` names. One that no constructor has is a part's, which has the default.
    """
    kinds = make.__mro__ if isinstance(make, type) else ()
    makers = [vars(kind)["__init__"] for kind in kinds if "__init__" in vars(kind)] or [make]
    found: dict[str, inspect.Parameter] = {}
    passed: tuple[str, ...] | None = None  # on to the next constructor; None: whatever comes
    for maker in makers:
        accepted = inspect.signature(maker).parameters
        for name, one in accepted.items():
            if one.kind in NAMED and name != "self" and (passed is None or name in passed):
                found.setdefault(name, one)
        rest = [one for one in accepted.values() if one.kind is one.VAR_KEYWORD]
        if not rest:
            break
        passed = passed or unpacked(rest[0], maker)
    for name in passed or ():
        found.setdefault(name, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY))
    return found


def unpacked(rest: inspect.Parameter, maker: Callable[..., Any]) -> tuple[str, ...] | None:
    """The names that ``**options: Unpack[Some]`` stands for; None under another annotation."""
    annotation = rest.annotation
    if isinstance(annotation, str):
        if not annotation.startswith("Unpack["):
            return None
        annotation = eval(annotation, vars(sys.modules[maker.__module__]))
    return tuple(get_args(annotation)[0].__annotations__) if get_origin(annotation) is Unpack else None


def _known(option: str, known: list[str]) -> str:
    if not known:
        return "it has none"
    near = difflib.get_close_matches(option, known, n=1)
    return f"it has {', '.join(known)}{f': did you mean {near[0]!r}?' if near else ''}"
