"""What a suite found: one entry per property."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from rich.table import Table

Status = Literal["passed", "failed", "skipped"]
COLOURS = {"passed": "green", "failed": "red", "skipped": "dim"}


class Skip(Exception):
    """A property does not apply, for the reason given."""


@dataclass(frozen=True)
class Check:
    """One property: its name, how it went, and the numbers or the reason."""

    name: str
    status: Status
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """All properties of one mechanism, and the seed that repeats the run. Print it with rich to see a table."""

    subject: str
    seed: int
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """No property failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == "failed")

    def raise_failures(self) -> None:
        """Raise AssertionError naming each failed property, the numbers and the seed."""
        if not self.ok:
            lines = [f"  {check.name}: {check.detail}" for check in self.failed]
            raise AssertionError("\n".join([f"{self.subject}, seed={self.seed}:", *lines]))

    def __str__(self) -> str:
        counts: Counter[str] = Counter(check.status for check in self.checks)
        said = ", ".join(f"{counts[status]} {status}" for status in COLOURS if counts[status])
        return f"{self.subject}: {said or 'nothing to check'} (seed={self.seed})"

    def __rich__(self) -> Table:
        table = Table("property", "", "detail", title=str(self))
        for check in self.checks:
            colour = COLOURS[check.status]
            table.add_row(check.name, f"[{colour}]{check.status}[/{colour}]", check.detail)
        return table


def fresh_seed() -> int:
    """A seed that no one has chosen."""
    return random.SystemRandom().randrange(2**31)


def verdict(name: str, seed: int, runs: Iterable[tuple[str, Callable[[], None]]]) -> Check:
    """Run a property in each of its forms, on random numbers from the seed."""
    failures, reasons, passed = [], [], False
    for form, run in runs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                run()
                passed = True
            except Skip as reason:
                reasons.append(str(reason))
            except Exception as failure:
                failures.append(f"{form}{explained(failure)}")
    if failures:
        return Check(name, "failed", "; ".join(failures))
    if passed:
        return Check(name, "passed")
    return Check(name, "skipped", reasons[0] if reasons else "it does not support this")


def explained(failure: Exception) -> str:
    """An assertion's own words; any other exception with its type."""
    if isinstance(failure, AssertionError):
        return str(failure)
    return f"raised {type(failure).__name__}: {failure}"
