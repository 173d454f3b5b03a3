"""What a mechanism may spend: the one option of a row that says it, and the values that a curve is drawn through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of a text's tokens


@dataclass(frozen=True)
class Budget:
    """An option that counts tokens, or one whose ``levels`` are listed, from the sparsest to the densest.

    ``each`` is how many tokens one of it stands for: a number, or the option that says it, such as the size of blocks.

    >>> Budget("k", each="block").values(4096, {"block": 64})
    [2, 4, 8, 16, 32]
    >>> Budget("mass", levels=(0.5, 0.9)).values(4096, {})
    [0.5, 0.9]
    """

    option: str
    levels: tuple[float, ...] = ()
    each: int | str = 1

    def values(self, length: int, options: Mapping[str, Any]) -> list[float]:
        """Values to try on texts of ``length`` tokens, with these other options."""
        if self.levels:
            return list(self.levels)
        each = self.each if isinstance(self.each, int) else int(options[self.each])
        return list(dict.fromkeys(max(1, round(length * share / each)) for share in SHARES))


def budget_of(name: str, given: Budget | str | None, make: Callable[..., Any]) -> Budget | None:
    """The budget that a row names, if it does; ValueError for an option that its function lacks."""
    from foveate.catalogue.options import options_of

    budget = Budget(given) if isinstance(given, str) else given
    known = options_of(make) if budget is not None else []
    for option in () if budget is None else (budget.option, budget.each):
        if isinstance(option, str) and option not in known:
            raise ValueError(f"the budget of {name} is its option {option!r}, but it has {', '.join(known)}")
    return budget


MASS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)  # shares of attention that some mechanisms take their keys by
