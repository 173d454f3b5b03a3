"""A contest: every contender is first held against the truth, then all are timed by turns in one process."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from foveate.lab import machine

RESULTS = Path(__file__).parent / "results"
Run = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Times:
    """Seconds of repeated runs."""

    minimum: float
    low: float  # lower quartile
    median: float
    high: float  # upper quartile
    repeats: int

    @staticmethod
    def of(seconds: list[float]) -> Times:
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return Times(min(seconds), low, median, high, len(seconds))


@dataclass(frozen=True)
class Case:
    """One line of a benchmark: its times, and each contender's minimum over the first one's."""

    name: str
    times: dict[str, Times]
    greatest_error: dict[str, float]

    @property
    def speedups(self) -> dict[str, float]:
        """How many times faster the first contender is than each, by their minima."""
        first = next(iter(self.times.values())).minimum
        return {name: times.minimum / first for name, times in self.times.items()}


def contest(name: str, contenders: Mapping[str, Run], truth: Run, *, tolerance: float, repeats: int) -> Case:
    """Check, then time: no figure of a contender that computes something else."""
    expected = truth()
    errors = {}
    for label, run in contenders.items():
        errors[label] = max(float((a - b).abs().max()) for a, b in zip(run(), expected, strict=True))
        if not errors[label] <= tolerance:
            raise SystemExit(f"{name}: {label} is off by {errors[label]:.2e}, more than {tolerance:.0e}; nothing timed")
    seconds: dict[str, list[float]] = {label: [] for label in contenders}
    with Progress(transient=True) as progress:
        task = progress.add_task(name, total=repeats * len(contenders))
        for _ in range(repeats):
            for label, run in contenders.items():
                start = time.perf_counter()
                run()
                seconds[label].append(time.perf_counter() - start)
                progress.advance(task)
    return Case(name, {label: Times.of(values) for label, values in seconds.items()}, errors)


def publish(name: str, title: str, cases: list[Case], **facts: Any) -> Path:
    """Print the table; write it as JSON beside the machine's description."""
    table = Table("case", "contender", "min", "median", "quartiles", "slower", title=title)
    for case in cases:
        for label, times in case.times.items():
            least, low, middle, high = (f"{1e3 * t:.1f}" for t in (times.minimum, times.low, times.median, times.high))
            ratio = f"{case.speedups[label]:.2f}x"
            table.add_row(case.name, label, f"{least} ms", f"{middle} ms", f"{low} to {high}", ratio)
        table.add_section()
    Console(width=120).print(table, f"{machine.in_words()}; {torch.get_num_threads()} threads")
    record = {"title": title, "machine": machine.describe(), **facts}
    record["cases"] = [asdict(case) | {"speedups": case.speedups} for case in cases]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(unfinished, path)
    return path
