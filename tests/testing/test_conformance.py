"""Every mechanism of the catalogue, and every pattern, is put to the conformance suite."""

from __future__ import annotations

import pytest
from tests.support.dynamic_examples import PATTERNS
from tests.support.pattern_examples import ON_GRIDS, ON_POINTS, ON_SEQUENCES

from foveate.catalogue.registry import Row, rows
from foveate.patterns import Layout, Packed, Pattern, causal, window
from foveate.testing import check_mixer, check_pattern


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_mixer(row: Row, seed: int) -> None:
    check_mixer(row, seed=seed)


@pytest.mark.parametrize("pattern", [*ON_SEQUENCES, *PATTERNS], ids=str)
def test_pattern(pattern: Pattern, seed: int) -> None:
    check_pattern(pattern, seed=seed, lengths=(1, 41))


@pytest.mark.parametrize(
    ("pattern", "layout"), [*ON_GRIDS, *ON_POINTS, (window(4) & causal, Packed([9, 0, 30, 2]))], ids=str
)
def test_pattern_on_a_layout(pattern: Pattern, layout: Layout, seed: int) -> None:
    check_pattern(pattern, layout=layout, seed=seed)
