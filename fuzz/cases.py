"""The kinds of cases, and what share of a run each has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from fuzz.draw import Draw

MODULES = ("attend", "select", "recur", "scans", "mixers", "compat", "malformed")


class Refused(Exception):
    """The library refuses the call, in words, and may: a pattern that does not fit, an implementation asked for."""


@dataclass(frozen=True)
class Kind:
    name: str
    run: Callable[[Draw], None]
    share: float


KINDS: dict[str, Kind] = {}


def kind(name: str, share: float) -> Callable[[Callable[[Draw], None]], Callable[[Draw], None]]:
    """Decorator: a function that draws one call and raises Disagreement, or Refused, or nothing."""

    def add(run: Callable[[Draw], None]) -> Callable[[Draw], None]:
        KINDS[name] = Kind(name, run, share)
        return run

    return add


def load() -> dict[str, Kind]:
    """All kinds, by name."""
    for module in MODULES:
        import_module(f"fuzz.kinds.{module}")
    return KINDS


def run_case(name: str, seed: int) -> None:
    """Run one case; what it finds is raised."""
    found = KINDS.get(name) or load()[name]
    found.run(Draw(f"{name}:{seed}"))
