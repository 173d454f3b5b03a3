"""The registry: one row per mechanism, with its papers and what it supports.

A mechanism's module is imported when its row is asked for; what there is, the index says without importing any.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from foveate.catalogue.papers import Paper, Reference, check_family, paper

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
    "registered",
    "row",
    "rows",
    "unregister",
]

Feature = Literal["causal", "noncausal", "cross", "padding", "packed", "grid", "decode", "gqa"]


@dataclass(frozen=True)
class Row:
    """A mechanism of the literature.

    ``mixer`` builds the module (dim, heads, options); ``core`` builds the training-free form, None where the
    mechanism has parameters of its own. ``papers`` are those of the catalogue that it keeps, or helps to keep;
    ``reference`` says where a mechanism comes from whose paper the catalogue does not have.
    """

    name: str
    papers: tuple[Paper, ...]
    family: str
    formula: str
    supports: frozenset[Feature]
    mixer: Callable[..., Mixer]
    core: Callable[..., Core] | None = None
    notes: str = ""
    reference: Reference | None = None

    @property
    def source(self) -> Reference:
        """Where the mechanism comes from: its first paper, or its reference."""
        return self.papers[0] if self.papers else self.reference or Reference("", "", "")

    @property
    def summary(self) -> str:
        """First sentence of the mixer's docstring."""
        return (self.mixer.__doc__ or "").strip().split("\n")[0]


_ROWS: dict[str, Row] = {}


def register(
    name: str,
    *,
    papers: tuple[str, ...] | None,
    formula: str,
    supports: set[Feature],
    reference: Reference | None = None,
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
        reference: authors, title and id, and
        family: one of the catalogue's.
        formula: what it computes, in a line.
        supports: what it claims, and `check_mixer` then tries.
        core: builds the training-free form, if it has one; by default the class's ``as_core``.
        notes: anything else a user should know.

    Raises ValueError for an unknown paper, family or feature, and for a name that another class has.
    """
    found = _papers(name, papers, reference, family)
    family = found[0].family if found else check_family(family or "")
    unknown = set(supports) - set(get_args(Feature))
    if unknown:
        raise ValueError(f"{name} supports {_listed(unknown)}, which is none of {_listed(get_args(Feature))}")

    def add(mixer: type[Mixer]) -> type[Mixer]:
        _refuse_taken(name, mixer)
        made = core or getattr(mixer, "as_core", None)
        row = Row(name, found, family, formula, frozenset(supports), mixer, made, notes, reference)
        mixer.row = row
        _ROWS[name] = row
        return mixer

    return add


def _papers(
    name: str, keys: tuple[str, ...] | None, reference: Reference | None, family: str | None
) -> tuple[Paper, ...]:
    """The papers of these keys, where keys and reference go together."""
    if isinstance(keys, str):
        raise TypeError(f"papers is a tuple of keys; write papers=({keys!r},) for {name}")
    if keys is None:
        if reference is None or family is None:
            raise ValueError(f"{name} names no paper of the catalogue: pass reference=Reference(...) and family=...")
        return ()
    if not keys:
        raise ValueError(f"{name} names no paper: pass papers=None with a reference and a family")
    if reference is not None or family is not None:
        raise ValueError(f"{name} names papers of the catalogue: these say its family and where it comes from")
    return tuple(paper(key) for key in keys)


def _refuse_taken(name: str, mixer: type[Mixer]) -> None:
    """Only the class that has a name may have it again, as when its module is run anew."""
    from foveate.catalogue.index import indexed, is_current

    entry = indexed().get(name)
    if name in _ROWS:
        owner: Any = _ROWS[name].mixer
        taken = (owner.__module__, owner.__qualname__)
    elif entry is not None and is_current(entry.module):
        taken = (entry.module, entry.cls)
    else:
        return
    if taken != (mixer.__module__, mixer.__qualname__):
        theirs, ours = ".".join(taken), f"{mixer.__module__}.{mixer.__qualname__}"
        raise ValueError(f"the name {name!r} is taken by {theirs}: register {ours} under another")


def _listed(words: Iterable[str]) -> str:
    return ", ".join(sorted(words))


def rows() -> list[Row]:
    """All rows, by family and name. Imports every mechanism; a warning names files that cannot be imported.

    >>> any(row.name == "moba" for row in rows())
    True
    """
    from foveate.catalogue.index import load, modules

    for broken in filter(None, map(load, modules())):
        warnings.warn(str(broken), RuntimeWarning, stacklevel=2)
    return sorted(_ROWS.values(), key=lambda row: (row.family, row.name))


def registered() -> tuple[Row, ...]:
    """The rows of what has been imported so far."""
    return tuple(_ROWS.values())


def unregister(name: str) -> None:
    """Take a row away again."""
    del _ROWS[name]


def names() -> list[str]:
    """The names of all mechanisms, by family and name. Imports none of them.

    >>> "moba" in names()
    True
    """
    from foveate.catalogue.index import catalogue

    return [entry.name for entry in catalogue().entries]


def row(name: str) -> Row:
    """The row of that name. Imports that mechanism, and no other.

    >>> row("moba").papers[0].id
    '2502.13189'

    Raises ValueError for an unknown name, offering the nearest ones.
    """
    from foveate.catalogue.index import entry

    return _ROWS[name] if name in _ROWS else entry(name).load()


def mixer(name: str, dim: int, **options: Any) -> Mixer:
    """Build the mixer of a mechanism: ``mixer("moba", 256, heads=4)``.

    >>> import torch
    >>> mixer("moba", 64, heads=4)(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """
    from foveate.catalogue.options import made

    return made(name, row(name).mixer, options, dim)
