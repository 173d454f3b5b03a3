"""The contenders of one case: each checked before it is timed, then all by turns, and what came of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch import Tensor

from benchmarks.contest import Run, seconds_of, take_turns
from benchmarks.targets import OURS, YARDSTICK, Measured, Target

PATIENCE = 1.5  # seconds for a contender's repeats; slower ones get three all the same, the slowest one
FEWEST = 3
SLOWEST = 5.0  # seconds of a single run

Tell = Callable[[str], None]


class Truth(Protocol):
    """What results are held against."""

    @property
    def tolerance(self) -> float: ...

    def error(self, results: tuple[Tensor, ...]) -> float: ...


def worst_row(got: Tensor, rows: Tensor) -> Tensor:
    """The greatest error of any row (..., D), over its length or, if that is greater, the median row's."""
    lengths = rows.norm(dim=-1)
    return ((got - rows).norm(dim=-1) / lengths.clamp(min=lengths.median())).max()


@dataclass(frozen=True)
class Settings:
    """How a run is measured, and the arithmetic limits found at its start."""

    impl: str
    repeats: int
    threads: int
    limits: dict[str, float]


@dataclass(frozen=True)
class Work:
    """What a case asks of the machine, and how much of that it does in a second at best."""

    of: str  # "operations" or "bytes"
    amount: float
    limit: float | None


@dataclass(frozen=True)
class Field:
    """The contenders of a case that computed the right thing, and why others are missing."""

    most: int  # repeats
    runs: dict[str, Run] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    amounts: dict[str, float] = field(default_factory=dict)  # of work, where it is not the case's

    def enter(self, label: str, run: Run, truth: Truth | None, check: Run | None = None) -> None:
        """Run once to check and to compile, once to see how long it takes.

        ``check`` is what to check in the place of ``run``.
        """
        if truth is not None:
            self.errors[label] = error = truth.error((check or run)())
            if not error <= truth.tolerance:
                raise ArithmeticError(f"it is off by {error:.1e} of a row, more than {truth.tolerance:.0e}")
        once = seconds_of(run)
        self.repeats[label] = min(self.most, max(FEWEST if once < SLOWEST else 1, int(PATIENCE / once)))
        self.runs[label] = run

    def must(self, case: str, label: str, enter: Callable[[], None]) -> None:
        """Enter one of ours: nothing is timed when that fails."""
        try:
            enter()
        except (ArithmeticError, NotImplementedError) as error:
            raise SystemExit(f"{case}: {label} cannot be timed: {error}") from error

    def may(self, label: str, enter: Callable[[], None]) -> None:
        """Enter a rival: whatever it raises is a fact about it."""
        try:
            with warnings.catch_warnings(action="ignore"):
                enter()
        except Exception as error:
            self.missing[label] = f"{type(error).__name__}: {error}".splitlines()[0].removeprefix("Unfit: ")[:200]

    def time(self, targets: Sequence[Target], work: Work, of_yardstick: float | None = None) -> dict[str, Any]:
        """Time all by turns, and judge: what a case's record says of its contenders."""
        times = take_turns(self.runs, self.repeats)
        seconds = {label: found.minimum for label, found in times.items()}
        of_limit = {}
        if work.limit:
            amounts = {label: self.amounts.get(label, work.amount) for label in seconds if label != YARDSTICK}
            of_limit = {label: amount / seconds[label] / work.limit for label, amount in amounts.items()}
        verdicts = [target.judge(Measured(seconds, of_limit.get(OURS), of_yardstick)) for target in targets]
        return {
            "work": asdict(work),
            "times": {label: asdict(found) for label, found in times.items()},
            "speedups": {label: t / seconds[OURS] for label, t in seconds.items()},
            "of_limit": of_limit,
            "errors": self.errors,
            "not_timed": self.missing,
            "targets": [asdict(verdict) | {"reached": verdict.reached} for verdict in verdicts],
        }
