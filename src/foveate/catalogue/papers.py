"""The papers of the catalogue, read from papers.tsv when first asked for."""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PATH = Path(__file__).parent / "papers.tsv"
OTHERS = Path(__file__).parent / "references.tsv"  # papers that the catalogue need not keep, but mechanisms are from
TIERS = ("operator", "model", "inference", "recipe", "distributed", "hook", "probe", "doc")
COLUMNS = ("key", "title", "authors", "id", "tier", "family", "domain", "works_when")


@dataclass(frozen=True)
class Reference:
    """Authors, title exactly as published, and arXiv id or DOI (empty where it has none)."""

    authors: str
    title: str
    id: str

    @property
    def url(self) -> str:
        """Where to read it; empty without an id."""
        if not self.id:
            return ""
        return f"https://arxiv.org/abs/{self.id}" if is_arxiv(self.id) else f"https://doi.org/{self.id}"


@dataclass(frozen=True)
class Paper(Reference):
    """A paper of the catalogue: what it must do here before it counts is ``works_when``."""

    key: str
    tier: str
    family: str
    domain: str
    works_when: str


def is_arxiv(identifier: str) -> bool:
    """Whether an id is arXiv's.

    >>> is_arxiv("2309.17453"), is_arxiv("10.1145/3696409.3700204")
    (True, False)
    """
    return re.fullmatch(r"\d{4}\.\d{4,5}", identifier) is not None


@cache
def papers() -> dict[str, Paper]:
    """All papers by key, family by family as in the table.

    >>> papers()["MoBA"].title
    'MoBA: Mixture of Block Attention for Long-Context LLMs'
    """
    return {line["key"]: Paper(**{column: line[column] for column in COLUMNS}) for line in _lines(PATH)}


@cache
def references() -> dict[str, tuple[Reference, str]]:
    """Papers of mechanisms here that are not the catalogue's, by key, each with its family.

    >>> references()["RetNet"][0].id
    '2307.08621'
    """
    return {
        line["key"]: (Reference(line["authors"], line["title"], line["id"]), line["family"]) for line in _lines(OTHERS)
    }


def reference(key: str) -> tuple[Reference, str]:
    """The reference of that key and its family; ValueError for an unknown key, offering the nearest ones."""
    if key not in references():
        raise ValueError(f"references.tsv has no key {key!r}{did_you_mean(key, references())}")
    return references()[key]


def _lines(path: Path) -> Iterable[dict[str, str]]:
    return csv.DictReader(path.read_text(encoding="utf-8").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)


def paper(key: str) -> Paper:
    """The paper of that key.

    >>> paper("StreamingLLM").id
    '2309.17453'

    Raises ValueError for an unknown key, offering the nearest ones.
    """
    if key not in papers():
        raise ValueError(f"no paper has the key {key!r}{did_you_mean(key, papers())} (`foveate rows` shows all)")
    return papers()[key]


@cache
def families() -> tuple[str, ...]:
    """The families of the table, in its order.

    >>> "linear" in families()
    True
    """
    return tuple(dict.fromkeys(paper.family for paper in papers().values()))


def check_family(family: str) -> str:
    """The family, if the table has it; ValueError if not."""
    if family not in families():
        raise ValueError(
            f"no family is called {family!r}{did_you_mean(family, families())}; there are {', '.join(families())}"
        )
    return family


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' with the known words nearest to one, or nothing."""
    spelt = {name.lower(): name for name in known}
    near = [spelt[name] for name in difflib.get_close_matches(word.lower(), spelt, n=3, cutoff=0.4)]
    return f"; did you mean {' or '.join(near)}?" if near else ""
