"""check_method: our methods pass it, and it finds what is broken and nothing else."""

from __future__ import annotations

import pytest
from tests.support.broken_methods import BROKEN, Sound, row_of

from foveate.catalogue.index import indexed
from foveate.testing import check_method
from foveate.testing.method import PROPERTIES

FREE = [entry for entry in indexed().values() if entry.training_free]
CAUSAL = [entry.name for entry in FREE if entry.tier == "inference" or "causal" in entry.supports]


@pytest.mark.parametrize("name", CAUSAL)
def test_every_method_holds_to_its_tier(name: str, seed: int) -> None:
    report = check_method(name, seed=seed)
    by_design = {check.name for check in report.checks if check.detail.startswith("by design")}
    passed = {check.name for check in report.checks if check.status == "passed"}
    assert passed | by_design >= {"undo", "padding", "generation"} and "undo" in passed


def test_a_sound_method_passes_everything(seed: int) -> None:
    report = check_method(row_of(Sound), seed=seed)
    assert [check.status for check in report.checks] == ["passed"] * len(PROPERTIES)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_method_fails_where_it_is_broken(name: str, seed: int) -> None:
    row, lacks = BROKEN[name]
    report = check_method(row, seed=seed, raise_on_failure=False)
    assert {check.name for check in report.failed} == lacks, report.failed


def test_every_property_can_fail() -> None:
    assert set().union(*(lacks for _, lacks in BROKEN.values())) == {prop.name for prop in PROPERTIES}


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(TypeError, match="check_method takes a method of the catalogue"):
        check_method("ravlt")
    with pytest.raises(ValueError, match="gla has parameters of its own"):
        check_method("gla")
    with pytest.raises(ValueError, match="neighborhood_attention has no causal form"):
        check_method("neighborhood_attention")
