"""Several learning rates for one mixer: which are still to be tried, and which did best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def still_to_try(runs: Sequence[dict[str, Any]], mixer: str, rates: Sequence[float]) -> list[float]:
    """Rates that this mixer has not learned with; none once it has solved the task with one of them.

    >>> still_to_try([{"mixer": "gla", "lr": 0.003, "solved": False}], "gla", [0.003, 0.01])
    [0.01]
    >>> still_to_try([{"mixer": "gla", "lr": 0.003, "solved": True}], "gla", [0.003, 0.01])
    []
    """
    own = [run for run in runs if run["mixer"] == mixer]
    if any(run["solved"] for run in own):
        return []
    return [rate for rate in rates if rate not in {run["lr"] for run in own}]


def best_of_each(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One run a mixer, in the order they came in: the most accurate, and beside it the others under ``other_rates``.

    >>> runs = [{"mixer": "gla", "lr": lr, "accuracy": accuracy} for lr, accuracy in [(0.003, 0.4), (0.01, 0.9)]]
    >>> [(best["lr"], len(best["other_rates"])) for best in best_of_each(runs)]
    [(0.01, 1)]
    """
    return [_best([run for run in runs if run["mixer"] == mixer]) for mixer in dict.fromkeys(r["mixer"] for r in runs)]


def every_run(found: dict[str, Any]) -> list[dict[str, Any]]:
    """All runs of a file of results; one without rates of its own was made with that of the recipe."""
    runs = [run for best in found["results"] for run in (best, *best.get("other_rates", []))]
    own = [{key: value for key, value in run.items() if key != "other_rates"} for run in runs]
    return [{"mixer": run["mixer"], "lr": found["recipe"].get("lr"), **run} for run in own]


def _best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    best = max(runs, key=lambda run: run["accuracy"])
    return {**best, "other_rates": [run for run in runs if run is not best]}
