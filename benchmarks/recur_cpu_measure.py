"""One case measured: every contender checked against float64, then timed by turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.field import Field, Settings, Tell
from benchmarks.recur_cpu_groups import Beside, Case
from benchmarks.targets import OURS


def measure(case: Case, settings: Settings, tell: Tell) -> dict[str, Any]:
    """A case's record, ready for JSON."""
    torch.manual_seed(0)
    problem, field = case.problem(), Field(settings.repeats)

    def enter(label: str, prepare: Callable[[], Any]) -> None:
        tell(label)
        field.enter(label, problem.run(prepare()), problem, problem.check(prepare()))

    def enter_beside(label: str, make: Callable[[str], Beside]) -> None:
        tell(label)
        other = make(settings.impl)
        field.enter(label, other.run, other.truth)
        field.amounts[label] = other.operations

    field.must(case.name, OURS, lambda: enter(OURS, lambda: problem.ours(settings.impl)))
    for label, make in case.beside.items():
        field.must(case.name, label, partial(enter_beside, label, make))
    for rival in case.rivals:
        field.may(rival.label, partial(enter, rival.label, partial(rival.prepare, problem)))
    tell("by turns")
    return {"name": case.name, "dtype": case.dtype_name, **field.time(case.targets, problem.work(settings))}
