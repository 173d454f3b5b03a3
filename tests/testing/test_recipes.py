"""check_recipe: our recipes pass it, and it finds what is broken and nothing else."""

from __future__ import annotations

import pytest
from tests.support.broken_recipes import BROKEN, Sound, row_of

from foveate.catalogue.index import indexed
from foveate.testing import check_recipe
from foveate.testing.recipe import PROPERTIES


@pytest.mark.parametrize("name", [entry.name for entry in indexed().values() if entry.tier == "recipe"])
def test_every_recipe_holds_to_its_tier(name: str, seed: int) -> None:
    check_recipe(name, seed=seed)


def test_a_sound_recipe_passes_everything(seed: int) -> None:
    report = check_recipe(row_of(Sound), seed=seed)
    assert [check.status for check in report.checks] == ["passed"] * len(PROPERTIES)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_recipe_fails_where_it_is_broken(name: str, seed: int) -> None:
    row, lacks = BROKEN[name]
    report = check_recipe(row, seed=seed, raise_on_failure=False)
    assert {check.name for check in report.failed} == lacks, report.failed


def test_every_property_can_fail() -> None:
    assert set().union(*(lacks for _, lacks in BROKEN.values())) == {prop.name for prop in PROPERTIES}


def test_what_is_no_recipe_is_refused() -> None:
    with pytest.raises(TypeError, match="check_recipe takes a recipe of the catalogue"):
        check_recipe("moba")
