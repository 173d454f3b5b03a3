"""check_parallel: our computations over process groups pass it, and it finds what is broken and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.support.broken_parallel import BROKEN, ONE_QUERY, row_of, sound

from foveate.catalogue.index import indexed
from foveate.catalogue.tiers import ParallelRow
from foveate.testing import check_parallel
from foveate.testing.parallel import PROPERTIES


@pytest.mark.parametrize("name", [entry.name for entry in indexed().values() if entry.tier == "distributed"])
def test_every_parallel_computation_holds_to_its_tier(name: str, seed: int) -> None:
    check_parallel(name, seed=seed)


@pytest.mark.parametrize("row", [row_of(sound), ONE_QUERY], ids=lambda row: row.name)
def test_a_sound_computation_passes_everything(row: ParallelRow, seed: int) -> None:
    report = check_parallel(row, seed=seed)
    assert [check.status for check in report.checks] == ["passed"] * len(PROPERTIES)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_computation_fails_where_it_is_broken(name: str, seed: int) -> None:
    row, lacks = BROKEN[name]
    report = check_parallel(row, seed=seed, raise_on_failure=False)
    assert {check.name for check in report.failed} == lacks, report.failed


def test_every_property_can_fail() -> None:
    assert set().union(*(lacks for _, lacks in BROKEN.values())) == {prop.name for prop in PROPERTIES}


def test_what_processes_cannot_import_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a function of a module"):
        check_parallel(replace(row_of(sound), function=lambda q, k, v, group: q))
    with pytest.raises(TypeError, match="check_parallel takes a parallel computation of the catalogue"):
        check_parallel("moba")
