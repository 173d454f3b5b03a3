"""One case measured: every contender checked against float64, then timed by turns."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.attend_cpu_groups import Case
from benchmarks.attend_cpu_problem import Problem
from benchmarks.attend_cpu_targets import OURS, YARDSTICK, Measured
from benchmarks.attend_cpu_truth import Truth
from benchmarks.contest import Run, Times, seconds_of, take_turns
from benchmarks.limits import bandwidth

PATIENCE = 1.5  # seconds for a contender's repeats; slower ones get three all the same, the slowest one
FEWEST = 3
SLOWEST = 5.0  # seconds of a single run

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How a run is measured, and the arithmetic limits found at its start."""

    impl: str
    repeats: int
    threads: int
    limits: dict[str, float]


@dataclass(frozen=True)
class Field:
    """The contenders of a case that computed the right thing, and why others are missing."""

    runs: dict[str, Run]
    errors: dict[str, float]
    missing: dict[str, str]
    repeats: dict[str, int]

    def enter(self, label: str, run: Run, truth: Truth | None, most: int) -> None:
        """Run once to check and to compile, once to see how long it takes."""
        if truth is not None:
            self.errors[label] = error = truth.error(run())
            if not error <= truth.tolerance:
                raise ArithmeticError(f"it is off by {error:.1e} of a row, more than {truth.tolerance:.0e}")
        once = seconds_of(run)
        self.repeats[label] = min(most, max(FEWEST if once < SLOWEST else 1, int(PATIENCE / once)))
        self.runs[label] = run


def measure(case: Case, settings: Settings, tell: Tell) -> dict[str, Any]:
    """A case's record, ready for JSON."""
    torch.manual_seed(0)
    problem = case.problem()
    tell("float64")
    truth = Truth(problem)
    field = Field({}, {}, {}, {})
    _enter_ours(field, case, problem, truth, settings, tell)
    for rival in case.rivals:
        tell(rival.label)
        try:
            with warnings.catch_warnings(action="ignore"):
                field.enter(rival.label, problem.run(rival.prepare(problem)), truth, settings.repeats)
        except Exception as error:  # whatever a rival raises is a fact about it
            field.missing[rival.label] = _first_line(error)
    tell("by turns")
    times = take_turns(field.runs, field.repeats)
    return _record(case, problem, field, times, settings)


def _enter_ours(field: Field, case: Case, problem: Problem, truth: Truth, settings: Settings, tell: Tell) -> None:
    tell(OURS)
    try:
        field.enter(OURS, problem.run(problem.ours(settings.impl)), truth, settings.repeats)
    except (ArithmeticError, NotImplementedError) as error:
        raise SystemExit(f"{case.name}: {OURS} cannot be timed: {error}") from error
    if case.yardstick is not None:
        dense = case.yardstick()
        field.enter(YARDSTICK, dense.run(dense.ours(settings.impl)), None, settings.repeats)


def _record(case: Case, problem: Problem, field: Field, times: dict[str, Times], settings: Settings) -> dict[str, Any]:
    seconds = {label: found.minimum for label, found in times.items()}
    work, limit = _work(case, problem, settings)
    of_limit = {label: work / t / limit for label, t in seconds.items() if limit and label != YARDSTICK}
    of_yardstick = problem.operations / case.yardstick().operations if case.yardstick else None
    measured = Measured(seconds, of_limit.get(OURS), of_yardstick)
    verdicts = [target.judge(measured) for target in case.targets]
    return {
        "name": case.name,
        "dtype": case.dtype_name,
        "pairs": problem.pairs,
        "work": {"of": "bytes" if case.decodes else "operations", "amount": work, "limit": limit},
        "times": {label: asdict(found) for label, found in times.items()},
        "speedups": {label: t / seconds[OURS] for label, t in seconds.items()},
        "of_limit": of_limit,
        "errors": field.errors,
        "not_timed": field.missing,
        "targets": [asdict(verdict) | {"reached": verdict.reached} for verdict in verdicts],
    }


def _work(case: Case, problem: Problem, settings: Settings) -> tuple[float, float | None]:
    """What the case asks of the machine, operations or bytes, and how many of them it does in a second at best."""
    if case.decodes:
        return problem.key_bytes, bandwidth(problem.key_bytes, settings.threads)["copy"]
    return problem.operations, settings.limits.get(case.dtype_name)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].removeprefix("Unfit: ")[:200]
