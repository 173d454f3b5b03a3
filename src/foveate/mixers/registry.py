"""The registry: one row per mechanism, with its paper and what it supports."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from foveate.mixers.base import Mixer
    from foveate.mixers.core import Core

Feature = Literal["causal", "noncausal", "cross", "padding", "packed", "grid", "decode", "gqa"]


@dataclass(frozen=True)
class Paper:
    """Authors, title exactly as published, and arXiv id."""

    authors: str
    title: str
    arxiv: str

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"


@dataclass(frozen=True)
class Row:
    """A mechanism of the literature.

    ``mixer`` builds the module (dim, heads, options); ``core`` builds the training-free form, None where the
    mechanism has parameters of its own.
    """

    name: str
    paper: Paper
    family: str
    formula: str
    supports: frozenset[Feature]
    mixer: Callable[..., Mixer]
    core: Callable[..., Core] | None = None
    notes: str = ""

    @property
    def summary(self) -> str:
        """First sentence of the mixer's docstring."""
        return (self.mixer.__doc__ or "").strip().split("\n")[0]


_ROWS: dict[str, Row] = {}


def register(
    name: str,
    *,
    paper: Paper,
    family: str,
    formula: str,
    supports: set[Feature],
    core: Callable[..., Core] | None = None,
    notes: str = "",
) -> Callable[[type[Mixer]], type[Mixer]]:
    """Class decorator that adds a mixer to the catalogue."""

    def add(mixer: type[Mixer]) -> type[Mixer]:
        if name in _ROWS and _ROWS[name].mixer.__qualname__ != mixer.__qualname__:
            raise ValueError(f"two mechanisms are registered as {name!r}")
        row = Row(name, paper, family, formula, frozenset(supports), mixer, core, notes)
        mixer.row = row
        _ROWS[name] = row
        return mixer

    return add


@cache
def _load() -> None:
    package = import_module("foveate.mixers")
    for module in iter_modules(package.__path__):
        import_module(f"foveate.mixers.{module.name}")


def rows() -> list[Row]:
    """All rows, by family and name.

    >>> any(row.name == "moba" for row in rows())
    True
    """
    _load()
    return sorted(_ROWS.values(), key=lambda row: (row.family, row.name))


def row(name: str) -> Row:
    """The row of that name.

    >>> row("moba").paper.arxiv
    '2502.13189'

    Raises ValueError for an unknown name, offering the nearest ones.
    """
    _load()
    if name not in _ROWS:
        near = difflib.get_close_matches(name.lower(), _ROWS, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"no mechanism is called {name!r}{hint} (`foveate list` shows all)")
    return _ROWS[name]


def mixer(name: str, dim: int, **options: Any) -> Mixer:
    """Build the mixer of a mechanism: ``mixer("moba", 256, heads=4)``.

    >>> import torch
    >>> mixer("moba", 64, heads=4)(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """
    return row(name).mixer(dim, **options)
