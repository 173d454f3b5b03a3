"""The registry of operators: one row per mechanism, with its papers and what it supports (others: tiers.py).

A mechanism's module is imported when its row is asked for; what there is, the index says without importing any.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from foveate.catalogue.budget import Budget, budget_of
from foveate.catalogue.docstring import docstring
from foveate.catalogue.namespace import ROWS, TierRow, sources
from foveate.catalogue.namespace import add as add_row
from foveate.catalogue.papers import Paper, Reference

if TYPE_CHECKING:
    from foveate.mixers.base import Mixer
    from foveate.mixers.core import Core

__all__ = [
    "Feature",
    "Paper",
    "Reference",
    "Row",
    "mixer",
    "names",
    "register",
    "row",
    "rows",
    "unregister",
]

Feature = Literal["causal", "noncausal", "cross", "padding", "packed", "grid", "decode", "gqa"]


@dataclass(frozen=True)
class Row(TierRow):
    """An operator of the literature.

    ``mixer`` builds the module (dim, heads, options); ``core`` builds the training-free form, None where the
    mechanism has parameters of its own.
    """

    tier: ClassVar[str] = "operator"
    formula: str
    supports: frozenset[Feature]
    mixer: Callable[..., Mixer]
    core: Callable[..., Core] | None = None

    @property
    def target(self) -> Any:
        return self.mixer

    @property
    def budget(self) -> Budget | None:
        """The option that says how much it spends, where there is one."""
        return budget_of(self.name, getattr(self.mixer, "spends", None), self.core or self.mixer)


def register(
    name: str,
    *,
    formula: str,
    papers: tuple[str, ...] | None = None,
    supports: set[Feature] | None = None,
    reference: Reference | str | None = None,
    family: str | None = None,
    core: Callable[..., Core] | None = None,
    notes: str = "",
) -> Callable[[type[Mixer]], type[Mixer]]:
    """Class decorator that adds a mixer to the catalogue.

    Args:
        name: what users write for it.
        papers: keys of the papers that it keeps (``foveate rows`` lists them), the one it is named after first: its
            family is the mechanism's. None for a mechanism whose paper the catalogue does not have, which says
            instead
        reference: a key of references.tsv, or authors, title and id and
        family: one of the catalogue's.
        formula: what it computes, in a line.
        supports: what it claims, and `check_mixer` then tries; by default what the class's ``usual_supports`` has.
        core: builds the training-free form, if it has one; by default the class's ``as_core``.
        notes: anything else a user should know.

    The docstring of the class gains the formula, the papers, the notes and, where it has none, an example.

    Raises ValueError for an unknown paper, family or feature, and for a name that another class has.
    """
    found, cited, family = sources("operator", name, papers, reference, family)
    unknown = set(supports or ()) - set(get_args(Feature))
    if unknown:
        raise ValueError(f"{name} supports {_listed(unknown)}, which is none of {_listed(get_args(Feature))}")

    def add(mixer: type[Mixer]) -> type[Mixer]:
        made = core or getattr(mixer, "as_core", None)
        can = frozenset(supports or mixer.usual_supports)
        if not can:
            raise ValueError(f"{name} supports nothing: pass supports, at least causal or noncausal")
        row = Row(name, found, family, formula, can, mixer, made, notes=notes, reference=cited)
        add_row(row)
        mixer.row, mixer.__doc__ = row, docstring(row)
        return mixer

    return add


def _listed(words: Iterable[str]) -> str:
    return ", ".join(sorted(words))


def rows() -> list[Row]:
    """The rows of all operators, by family and name. Imports each; a warning names files that cannot be imported.

    >>> any(row.name == "moba" for row in rows())
    True
    """
    from foveate.catalogue.index import load, modules

    for broken in filter(None, map(load, modules("mixers"))):
        warnings.warn(str(broken), RuntimeWarning, stacklevel=2)
    found = [row for row in ROWS.values() if isinstance(row, Row)]
    return sorted(found, key=lambda row: (row.family, row.name))


def unregister(name: str) -> None:
    """Take a row away again."""
    del ROWS[name]


def names() -> list[str]:
    """The names of all operators, by family and name. Imports none of them.

    >>> "moba" in names()
    True
    """
    from foveate.catalogue.index import catalogue

    return [entry.name for entry in catalogue().entries if entry.tier == "operator"]


def row(name: str) -> Row:
    """The row of that operator. Imports it, and no other.

    >>> row("moba").papers[0].id
    '2502.13189'

    Raises ValueError for an unknown name, offering the nearest ones, and for the name of what is no operator.
    """
    from foveate.catalogue.index import entry

    found = ROWS[name] if name in ROWS else entry(name).load()
    if not isinstance(found, Row):
        raise ValueError(f"{name} is of the tier {found.tier}, not an operator: foveate.catalogue.tiers.row has it")
    return found


def mixer(name: str, dim: int, **options: Any) -> Mixer:
    """Build the mixer of a mechanism: ``mixer("moba", 256, heads=4)``.

    >>> import torch
    >>> mixer("moba", 64, heads=4)(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """
    from foveate.catalogue.options import made

    return made(name, row(name).mixer, options, dim)
