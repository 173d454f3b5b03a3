"""One case measured: every contender checked against float64, then timed by turns."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.attend_cpu_groups import Case
from benchmarks.attend_cpu_problem import Problem
from benchmarks.attend_cpu_truth import Truth
from benchmarks.field import Field, Settings, Tell, Work
from benchmarks.limits import bandwidth
from benchmarks.rivals import Rival
from benchmarks.targets import OURS, YARDSTICK


def measure(case: Case, settings: Settings, tell: Tell) -> dict[str, Any]:
    """A case's record, ready for JSON."""
    torch.manual_seed(0)
    problem = case.problem()
    tell("float64")
    truth = Truth(problem)
    field = Field(settings.repeats)
    tell(OURS)
    field.must(case.name, OURS, lambda: field.enter(OURS, problem.run(problem.ours(settings.impl)), truth))
    dense = None if case.yardstick is None else case.yardstick()
    if dense is not None:
        field.enter(YARDSTICK, dense.run(dense.ours(settings.impl)), None)

    def enter(rival: Rival) -> None:
        field.enter(rival.label, problem.run(rival.prepare(problem)), truth)

    for rival in case.rivals:
        tell(rival.label)
        field.may(rival.label, partial(enter, rival))
    tell("by turns")
    share = None if dense is None else problem.operations / dense.operations
    said = field.time(case.targets, _work(case, problem, settings), share)
    return {"name": case.name, "dtype": case.dtype_name, "pairs": problem.pairs, **said}


def _work(case: Case, problem: Problem, settings: Settings) -> Work:
    if case.decodes:
        return Work("bytes", problem.key_bytes, bandwidth(problem.key_bytes, settings.threads)["copy"])
    return Work("operations", problem.operations, settings.limits.get(case.dtype_name))
