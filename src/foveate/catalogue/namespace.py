"""What rows of all tiers share: papers, a family, and a name that nothing else in the catalogue has."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from foveate.catalogue import papers as tables
from foveate.catalogue.papers import Paper, Reference, check_family, paper

SERVES: dict[str, Collection[str]] = {"model": ("model", "operator")}  # a model shows the operator published with it


@dataclass(frozen=True)
class TierRow:
    """Something of the catalogue, of any tier.

    ``papers`` are those that it keeps, or helps to keep; ``reference`` says where it comes from if the catalogue does
    not have its paper.
    """

    tier: ClassVar[str]
    name: str
    papers: tuple[Paper, ...]
    family: str
    notes: str = field(default="", kw_only=True)
    reference: Reference | None = field(default=None, kw_only=True)

    @property
    def target(self) -> Any:
        """The class or the function that has the name."""
        raise NotImplementedError

    @property
    def source(self) -> Reference:
        """Where it comes from: its first paper, or its reference."""
        return self.papers[0] if self.papers else self.reference or Reference("", "", "")

    @property
    def summary(self) -> str:
        """First sentence of the docstring."""
        return (self.target.__doc__ or "").strip().split("\n")[0]


ROWS: dict[str, TierRow] = {}


def add(row: TierRow) -> None:
    """Give a row its name; ValueError if another has it."""
    _refuse_taken(row)
    ROWS[row.name] = row


class Sources(NamedTuple):
    """Where a row comes from."""

    papers: tuple[Paper, ...]
    reference: Reference | None
    family: str


def sources(
    tier: str, name: str, keys: tuple[str, ...] | None, reference: Reference | str | None, family: str | None
) -> Sources:
    """The papers of these keys and their family, or a reference: one with a family, or the key of references.tsv.

    Raises ValueError for an unknown key or family, and for a paper of another tier. An operator may be part of
    anything, so that operators may name papers of every tier.
    """
    if isinstance(keys, str):
        raise TypeError(f"papers is a tuple of keys; write papers=({keys!r},) for {name}")
    if keys is None:
        if isinstance(reference, str):
            reference, usual = tables.reference(reference)
            family = family or usual
        if reference is None or family is None:
            raise ValueError(f"{name} names no paper of the catalogue: pass reference=Reference(...) and family=...")
        return Sources((), reference, check_family(family))
    if not keys:
        raise ValueError(f"{name} names no paper: pass papers=None with a reference and a family")
    if reference is not None or family is not None:
        raise ValueError(f"{name} names papers of the catalogue: these say its family and where it comes from")
    found = tuple(paper(key) for key in keys)
    for one in found:
        if tier != "operator" and one.tier not in SERVES.get(tier, (tier,)):
            raise ValueError(
                f"{name} is registered as {tier}, but {one.key} is kept by a row of tier {one.tier} (`foveate rows "
                f"{one.key!r}` says what it asks)"
            )
    return Sources(found, None, found[0].family)


def _refuse_taken(row: TierRow) -> None:
    """Only the class or function that has a name may have it again, as when its module is run anew."""
    from foveate.catalogue.index import indexed, is_current

    entry = indexed().get(row.name)
    if row.name in ROWS:
        owner = ROWS[row.name].target
        taken = (owner.__module__, owner.__qualname__)
    elif entry is not None and is_current(entry.module):
        taken = (entry.module, entry.target)
    else:
        return
    if taken != (row.target.__module__, row.target.__qualname__):
        theirs, ours = ".".join(taken), f"{row.target.__module__}.{row.target.__qualname__}"
        raise ValueError(f"the name {row.name!r} is taken by {theirs}: register {ours} under another")
