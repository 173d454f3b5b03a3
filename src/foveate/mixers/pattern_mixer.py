"""Mixers that are a pattern: a function of options is all that a mechanism writes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from foveate.catalogue.options import parameters_of
from foveate.mixers.attention import AttentionMixer
from foveate.mixers.core import PatternCore
from foveate.patterns import Pattern


class PatternMixer(AttentionMixer):
    """Attention over ``pattern(**options)``; constructor, training-free core, decoding and costs follow from it.

    >>> import torch
    >>> from foveate import window
    >>> from foveate.catalogue.registry import Reference, register, unregister
    >>> @register("nearest", papers=None, reference=Reference("You", "Nearest", ""), family="static-sparse",
    ...           formula="o_i = Σ_j softmax_j(q_i·k_j / √d) v_j over |i - j| ≤ w", supports={"causal", "decode"})
    ... class Nearest(PatternMixer):
    ...     '''Attention to the nearest keys.'''
    ...     @staticmethod
    ...     def pattern(*, width: int = 64) -> Pattern:
    ...         return window(width)
    >>> Nearest(32, heads=4, width=9).core.pattern
    window(9)
    >>> Nearest.row.core(width=5).pattern
    window(5)
    >>> unregister("nearest")

    Options and their defaults stand in the signature of ``pattern`` alone. Where one of them is ``causal``, the
    mixer's own is passed on.
    """

    pattern: ClassVar[Callable[..., Pattern]]
    as_core: ClassVar[Callable[..., PatternCore]]

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "pattern" in vars(cls):
            cls.__init__ = _constructor(cls)  # type: ignore[method-assign]
            cls.as_core = staticmethod(_core_of(cls))


def _constructor(cls: type[PatternMixer]) -> Callable[..., None]:
    """``__init__(self, dim, heads, *, <the pattern's options>, <the base's>)``, whose core is the pattern."""
    parameters = inspect.signature(cls.pattern).parameters
    given = parameters_of(cls.__mro__[1])

    def __init__(self: PatternMixer, *sizes: int, **options: Any) -> None:
        own = {name: options.pop(name) for name in parameters if name in options and name != "causal"}
        if "causal" in parameters:
            own["causal"] = options.get("causal", given["causal"].default)
        super(cls, self).__init__(*sizes, core=PatternCore(cls.pattern(**own)), **options)

    ahead = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    ahead += [one for one in given.values() if one.kind is one.POSITIONAL_OR_KEYWORD]
    own = [one for name, one in parameters.items() if name != "causal"]
    rest = [one for name, one in given.items() if one.kind is one.KEYWORD_ONLY and name not in {"core", *parameters}]
    rest += [given["causal"]] if "causal" in parameters else []
    __init__.__signature__ = inspect.Signature([*ahead, *own, *rest])  # type: ignore[attr-defined]
    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    return __init__


def _core_of(cls: type[PatternMixer]) -> Callable[..., PatternCore]:
    def core(**options: Any) -> PatternCore:
        return PatternCore(cls.pattern(**options))

    core.__signature__ = inspect.signature(cls.pattern)  # type: ignore[attr-defined]
    core.__doc__, core.__qualname__, core.__module__ = cls.__doc__, f"{cls.__qualname__}.as_core", cls.__module__
    return core
