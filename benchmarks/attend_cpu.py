"""Foveate's attention on a CPU against what PyTorch offers there, in the cases that its kernels are made for.

    python -m benchmarks.attend_cpu                              everything: a quarter of an hour
    python -m benchmarks.attend_cpu --case swin --case decode    two groups of cases
    python -m benchmarks.attend_cpu --quick                      small sizes, to see that it works

Every contender is first held against float64. After each case the groups measured so far are brought up to date in
the JSON; at the end the plot is drawn again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.attend_cpu_groups import GROUPS, Case
from benchmarks.attend_cpu_measure import Settings, measure
from benchmarks.attend_cpu_plot import draw
from benchmarks.attend_cpu_report import Record, table
from benchmarks.contest import RESULTS
from benchmarks.limits import arithmetic
from foveate.attention import IMPLEMENTATIONS
from foveate.lab import machine
from foveate.native.loader import status


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    record, console = Record(options.out), Console(width=None if sys.stdout.isatty() else 130)
    for name in options.case or GROUPS:
        settings = Settings(options.impl, options.repeats, options.threads, arithmetic(options.threads))
        run_group(name, list(GROUPS[name](options.quick)), settings, record, console)
        console.print(table(name, record.groups[name]))
    console.print(f"written to {record.path} and {draw(record.groups, record.path.with_suffix('.svg'))}")


def run_group(name: str, cases: list[Case], settings: Settings, record: Record, console: Console) -> None:
    """Measure one case after another, each kept as soon as it is there."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    facts, measured = about(settings), []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=len(cases))

        def doing(case: Case) -> Callable[[str], None]:
            heading = f"{name}: {case.name}, {case.dtype_name}"
            return lambda what: progress.update(task, description=f"{heading}: {what}")

        for case in cases:
            measured.append(measure(case, settings, doing(case)))
            record.add(name, facts, measured)
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


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = ", ".join(GROUPS)
    parser.add_argument("--case", action="append", choices=GROUPS, metavar="GROUP", help=f"only these groups: {names}")
    parser.add_argument("--quick", action="store_true", help="small sizes; written to out/ unless --out is given")
    parser.add_argument("--repeats", type=int, default=25, help="most repeats of a contender (default: 25)")
    parser.add_argument("--threads", type=int, default=min(2, machine.available_cores()), help="default: 2")
    parser.add_argument("--impl", choices=IMPLEMENTATIONS, default="native", help="which of ours (default: native)")
    parser.add_argument("--out", type=Path, help="JSON to bring up to date; the plot lies beside it")
    options = parser.parse_args(arguments)
    options.out = options.out or (Path("out") if options.quick else RESULTS) / "attend_cpu.json"
    return options


if __name__ == "__main__":
    main()
