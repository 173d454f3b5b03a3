"""check_probe and check_doc: they find what is broken and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.catalogue.contracts import Finding, Page
from foveate.catalogue.index import indexed
from foveate.catalogue.registry import Reference
from foveate.catalogue.tiers import DocRow, ProbeRow
from foveate.testing import check_doc, check_probe
from foveate.testing import doc as doc_suite
from foveate.testing import probe as probe_suite

NOBODY = Reference("Nobody", "Nothing", "0000.00000")
ROOT = Path(__file__).parents[2]
PICTURE = '<svg xmlns="http://www.w3.org/2000/svg"><rect width="3" height="4"/></svg>'


def found(seed: int = 0, tosses: int = 900, **changed: Any) -> Finding:
    heads = torch.rand(tosses, generator=torch.Generator().manual_seed(seed)).gt(0.5).double().mean().item()
    facts = {"claim": "coins are fair", "confirmed": abs(heads - 0.5) < 0.2, "figures": {"heads": heads}}
    return Finding(**{**facts, "picture": PICTURE, **changed})


def globally(seed: int, tosses: int) -> Finding:
    torch.manual_seed(seed)
    return found(int(torch.randint(99, ())), tosses)


RUNS = count()
BROKEN: dict[str, tuple[Callable[..., Finding], set[str]]] = {
    "claims nothing": (lambda **sizes: found(**sizes, claim=" "), {"verdict"}),
    "is undecided": (lambda **sizes: found(**sizes, confirmed=None), {"verdict"}),
    "has no figures": (lambda **sizes: found(**sizes, figures={}), {"figures"}),
    "diverges": (lambda **sizes: found(**sizes, figures={"loss": float("inf")}), {"figures"}),
    "has no picture": (lambda **sizes: found(**sizes, picture="a plot"), {"picture"}),
    "draws nothing": (lambda **sizes: found(**sizes, picture="<svg/>"), {"picture"}),
    "differs": (lambda **sizes: found(**sizes, figures={"run": float(next(RUNS))}), {"repeatable"}),
    "draws from the caller": (globally, {"random numbers"}),
}


def row_of(probe: Callable[..., Finding]) -> ProbeRow:
    return ProbeRow("mine", (), "none", probe, reference=NOBODY, tiny={"tosses": 100})


@pytest.mark.parametrize("name", [entry.name for entry in indexed().values() if entry.tier == "probe"])
def test_every_probe_holds_to_its_tier(name: str, seed: int) -> None:
    check_probe(name, seed=seed)


def test_a_sound_probe_passes_everything(seed: int) -> None:
    report = check_probe(row_of(found), seed=seed)
    assert [check.status for check in report.checks] == ["passed"] * len(probe_suite.PROPERTIES)
    assert row_of(found).run(3).verdict == "confirmed"


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_probe_fails_where_it_is_broken(what: str, seed: int) -> None:
    probe, lacks = BROKEN[what]
    report = check_probe(row_of(probe), seed=seed, raise_on_failure=False)
    assert {check.name for check in report.failed} == lacks, report.failed


def test_every_property_can_fail() -> None:
    assert set().union(*(lacks for _, lacks in BROKEN.values())) == {prop.name for prop in probe_suite.PROPERTIES}


# ---- pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [entry.name for entry in indexed().values() if entry.tier == "doc"])
def test_every_survey_holds_to_its_tier(name: str) -> None:
    check_doc(name, root=ROOT)


@pytest.mark.parametrize(
    ("text", "covers", "lacks"),
    [
        ("`moba` and [others](other.md), [a paper](https://arxiv.org)", ("moba",), set()),
        ("`moba` and [others](lost.md)", ("moba",), {"links"}),
        ("`moba` and `mobo`", ("moba", "mobo"), {"names"}),
        ("nothing", (), {"names"}),
        ("`moba`", ("moba", "gla"), {"mentions"}),
    ],
)
def test_a_broken_page_fails_where_it_is_broken(
    text: str, covers: tuple[str, ...], lacks: set[str], tmp_path: Path
) -> None:
    (tmp_path / "page.md").write_text(text, encoding="utf-8")
    (tmp_path / "other.md").touch()
    row = DocRow("mine", (), "none", lambda: Page("page.md", covers), reference=NOBODY)
    report = check_doc(row, root=tmp_path, raise_on_failure=False)
    assert {check.name for check in report.failed} == lacks, report.failed
    assert len(report.checks) == len(doc_suite.PROPERTIES)


@pytest.mark.parametrize("check", [check_probe, check_doc])
def test_what_is_of_another_tier_is_refused(check: Any) -> None:
    with pytest.raises(TypeError, match="of the tier operator"):
        check("moba")
