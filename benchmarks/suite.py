"""A benchmark of many groups of cases: its command line, its progress, its table, JSON and picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.contest import RESULTS
from benchmarks.field import Settings, Tell
from benchmarks.limits import arithmetic
from benchmarks.plot import draw
from benchmarks.report import Record, table
from foveate.kernels.cpu.loader import status
from foveate.lab.measure import machine


class Named(Protocol):
    """What every case has."""

    @property
    def name(self) -> str: ...

    @property
    def dtype_name(self) -> str: ...


@dataclass(frozen=True)
class Suite:
    """What one benchmark measures."""

    name: str  # of its results
    about: str  # in a line
    groups: Mapping[str, Callable[[bool], Iterable[Any]]]  # cases, small ones if asked for quick ones
    titles: Mapping[str, str]
    measure: Callable[[Any, Settings, Tell], dict[str, Any]]
    impls: Collection[str]
    impl: str  # by default
    conclude: Callable[[str, list[dict[str, Any]]], list[str]] = lambda name, cases: []  # sentences on a whole group

    def run(self, arguments: Sequence[str] | None = None) -> None:
        """Measure what the command line asks for; bring the JSON up to date after each case."""
        options = _options(self, arguments)
        torch.set_num_threads(options.threads)
        record, console = Record(options.out), Console(width=None if sys.stdout.isatty() else 130)
        for name in options.case or self.groups:
            settings = Settings(options.impl, options.repeats, options.threads, arithmetic(options.threads))
            self.run_group(name, list(self.groups[name](options.quick)), settings, record, console)
            console.print(table(self.titles[name], record.groups[name]))
        drawn = draw(self.titles, record.groups, record.path.with_suffix(".svg"))
        console.print(f"written to {record.path} and {drawn}")

    def run_group(
        self, name: str, cases: Sequence[Named], settings: Settings, record: Record, console: Console
    ) -> None:
        """Measure one case after another, each kept as soon as it is there."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        measured: list[dict[str, Any]] = []
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(name, total=len(cases))

            def doing(case: Named) -> Tell:
                heading = f"{name}: {case.name}, {case.dtype_name}"
                return lambda what: progress.update(task, description=f"{heading}: {what}")

            for case in cases:
                measured.append(self.measure(case, settings, doing(case)))
                record.add(name, about(settings), measured, self.conclude(name, measured))
                progress.advance(task)


def about(settings: Settings) -> dict[str, Any]:
    """What figures depend on."""
    return {
        "machine": machine.describe(),
        "impl": settings.impl,
        "isa": status().isa,
        "threads": settings.threads,
        "limits": settings.limits,
    }


def _options(suite: Suite, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=suite.about)
    groups, names = suite.groups, ", ".join(suite.groups)
    parser.add_argument("--case", action="append", choices=groups, metavar="GROUP", help=f"only these groups: {names}")
    parser.add_argument("--quick", action="store_true", help="small sizes; written to out/ unless --out is given")
    parser.add_argument("--repeats", type=int, default=25, help="most repeats of a contender (default: 25)")
    parser.add_argument("--threads", type=int, default=min(2, machine.available_cores()), help="default: 2")
    parser.add_argument(
        "--impl", choices=suite.impls, default=suite.impl, help=f"which of ours (default: {suite.impl})"
    )
    parser.add_argument("--out", type=Path, help="JSON to bring up to date; the plot lies beside it")
    options = parser.parse_args(arguments)
    options.out = options.out or (Path("out") if options.quick else RESULTS) / f"{suite.name}.json"
    return options
