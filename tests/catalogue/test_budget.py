"""Budgets: values between a thirty-second and a half of a text, of options that there are."""

from __future__ import annotations

import pytest

from foveate.catalogue import registry, tiers
from foveate.catalogue.budget import Budget, budget_of
from foveate.catalogue.options import options_of


def test_values_are_shares_of_the_text_or_those_listed() -> None:
    assert Budget("window").values(4096, {}) == [128, 256, 512, 1024, 2048]
    assert Budget("k", each="block").values(1024, {"block": 64}) == [1, 2, 4, 8]  # none of them twice
    assert Budget("k", each=16).values(1024, {}) == [2, 4, 8, 16, 32]
    assert Budget("mass", levels=(0.5, 1.0)).values(7, {}) == [0.5, 1.0]


def test_a_budget_is_an_option_of_its_row() -> None:
    def method(window: int = 3, block: int = 4) -> None: ...

    assert budget_of("mine", "window", method) == Budget("window") and budget_of("mine", None, method) is None
    assert budget_of("mine", Budget("window", each="block"), method) == Budget("window", each="block")
    for wrong in ("windw", Budget("window", each="size")):
        with pytest.raises(ValueError, match="the budget of mine is its option"):
            budget_of("mine", wrong, method)


def test_every_row_with_a_budget_can_be_made_with_all_of_its_values() -> None:
    found = 0
    for row in tiers.rows("inference"):
        if row.budget is not None:
            values = row.budget.values(8192, {"chunk": 256})
            assert len(values) > 2 and values == sorted(values, reverse=row.budget.option == "stride")
            assert row.make(**{row.budget.option: values[-1]}) is not None and row.budget.option in options_of(
                row.function
            )
            found += 1
    for name in registry.names():
        row = registry.row(name)
        if row.core is not None and row.budget is not None:
            options = {"block": 64}
            assert row.core(**{row.budget.option: row.budget.values(8192, options)[-1]}).pattern is not None
            found += 1
    assert found > 15
