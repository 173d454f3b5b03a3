"""The stages that recipes have unless told otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from foveate.catalogue import tiers

STAGES = {
    "dara": [("rebalance", 1000, 1e-2)],
    "linearise": [("fine-tune", 1000, 1e-4)],
    "lit": [("distil", 1000, 1e-4)],
    "longgen": [("extend", 1000, 1e-3)],
    "reward_forcing": [("distil", 1000, 1e-3)],
    "sparse_sparse_attention": [("align", 1000, 3e-4)],
    "tune_state": [("tune", 1000, 3e-2)],
    "zeroi2v": [("adapt", 1000, 1e-2)],
}


@pytest.mark.parametrize("name", STAGES)
def test_a_recipe_has_its_stages(name: str) -> None:
    row: Any = tiers.row(name)
    assert [(stage.name, stage.steps, stage.lr) for stage in row.make(**row.tiny).stages] == STAGES[name]
