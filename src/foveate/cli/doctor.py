"""`foveate doctor`: what runs on this machine, and why the rest does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from foveate.cli.screen import FAILED, out

if TYPE_CHECKING:
    from foveate.lab.doctor import Report

HELP = """Say what runs on this machine, why the rest does not, and what is missing.

Every implementation that says it runs is run, and compared with the
definition. Status 1 if one disagrees.

[bold]Examples[/bold]

  foveate doctor
  foveate doctor --json
"""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    from foveate.lab.doctor import examine

    report = examine()
    if as_json:
        typer.echo(report.to_json())
    else:
        _print(report)
    if report.disagreements:
        raise typer.Exit(FAILED)


def _print(report: Report) -> None:
    from foveate.lab.doctor import kernels

    console = out()
    machine = _plain("machine", "")
    for name, value in report.machine.items():
        machine.add_row(name.replace("_", " "), escape(_said(value)))
    native = _plain("native kernels", "")
    for name, fate in kernels(report.native):
        colour = "green" if name == report.native.isa else "yellow"
        native.add_row(name, f"[{colour}]{escape(fate)}[/{colour}]")
    tried = _plain("operator", "implementation", "device", "call", "")
    for trial in report.trials:
        verdict = _verdict(trial.verdict, trial.detail)
        tried.add_row(trial.operator, trial.implementation, trial.device, trial.call, verdict)
    extras = _plain("extra", "", "")
    for extra in report.extras:
        mend = f"missing {', '.join(extra.missing)}: [cyan]{escape(extra.command)}[/cyan]" if extra.missing else ""
        extras.add_row(escape(f"[{extra.name}]"), ", ".join(extra.present), mend)
    for table in (machine, native, tried, extras):
        console.print(table, "")


def _plain(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _said(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else "none" if value is None else str(value)


def _verdict(verdict: str, detail: str) -> str:
    colour = {"runs": "green", "does not run": "yellow", "disagrees": "bold red"}[verdict]
    return f"[{colour}]{verdict}[/{colour}]{': ' if detail else ''}{escape(detail)}"
