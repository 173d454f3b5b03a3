"""check_model: our models pass it, and it finds what is broken and nothing else."""

from __future__ import annotations

import pytest
import torch
from tests.support.broken_models import BROKEN, Sound, row_of

from foveate.catalogue.index import indexed
from foveate.testing import check_model
from foveate.testing.model import PROPERTIES


@pytest.mark.parametrize("name", [entry.name for entry in indexed().values() if entry.tier == "model"])
def test_every_model_holds_to_its_tier(name: str, seed: int) -> None:
    check_model(name, seed=seed)


def test_a_sound_model_passes_everything(seed: int) -> None:
    report = check_model(row_of(Sound), seed=seed)
    assert [check.status for check in report.checks] == ["passed"] * len(PROPERTIES)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_fails_where_it_is_broken(name: str, seed: int) -> None:
    row, lacks = BROKEN[name]
    report = check_model(row, seed=seed, raise_on_failure=False)
    assert {check.name for check in report.failed} == lacks, report.failed


def test_every_property_can_fail() -> None:
    assert set().union(*(lacks for _, lacks in BROKEN.values())) == {prop.name for prop in PROPERTIES}


@pytest.mark.parametrize("wrong", ["moba", torch.nn.Linear, 3])
def test_what_is_no_model_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="check_model takes a model of the catalogue"):
        check_model(wrong)  # type: ignore[arg-type]
