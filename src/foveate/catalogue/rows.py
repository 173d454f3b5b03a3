"""What has become of each paper: the mechanisms that name it, the tests that show it, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foveate.catalogue.evidence import KINDS, evidence
from foveate.catalogue.index import Entry, catalogue
from foveate.catalogue.papers import Paper, papers


@dataclass(frozen=True)
class PaperRow:
    """A paper, the names of its mechanisms, and the ids of the tests that are evidence of either kind."""

    paper: Paper
    names: tuple[str, ...]
    evidence: Mapping[str, tuple[str, ...]]
    has_row: bool = True  # of the paper's own tier: a mixer alone keeps no paper that proposes a model

    @property
    def kept(self) -> bool:
        """A paper counts when something of its own tier has its name, and both kinds of evidence exist."""
        return self.has_row and all(self.evidence[kind] for kind in KINDS)

    @property
    def missing(self) -> str:
        """What it still wants, in words; empty for a paper kept."""
        if not self.names and not any(self.evidence.values()):
            return "nothing here yet"
        wanted = [] if self.has_row else [f"no {self.paper.tier}"]
        return ", ".join(wanted + [f"no {kind} test" for kind in KINDS if not self.evidence[kind]])

    def facts(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "key": self.paper.key,
            "title": self.paper.title,
            "family": self.paper.family,
            "tier": self.paper.tier,
            "names": list(self.names),
            "kept": self.kept,
            "evidence": {kind: list(tests) for kind, tests in self.evidence.items()},
        }


def paper_rows() -> list[PaperRow]:
    """All papers, in the order of the table.

    >>> {row.paper.key: row.names for row in paper_rows()}["TTT"]
    ('ttt_linear', 'ttt_mlp')
    """
    entries = catalogue().entries
    return [paper_row(paper, entries) for paper in papers().values()]


def paper_row(paper: Paper, entries: tuple[Entry, ...]) -> PaperRow:
    """One paper, of these mechanisms."""
    tests = evidence().get(paper.key, {})
    own = [entry for entry in entries if paper.key in entry.papers]
    kinds: dict[str, tuple[str, ...]] = {kind: tuple(tests.get(kind, ())) for kind in KINDS}
    has_row = any(paper.tier in entry.tiers for entry in own)
    return PaperRow(paper, tuple(entry.name for entry in own), kinds, has_row)
