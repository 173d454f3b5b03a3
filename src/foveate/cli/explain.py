"""`foveate explain`: which implementation runs a call of each operator on this machine, and what it plans."""

from __future__ import annotations

from typing import Annotated

import typer

HELP = """Say which implementation runs a small call of each operator, and why no other one does.

[bold]Examples[/bold]

  foveate explain
  foveate explain recur

In Python, foveate.explain(recur, q, k, v, ...) says it of any call.
"""


def explain(
    name: Annotated[str | None, typer.Argument(metavar="OPERATOR", help="One of them alone.")] = None,
) -> None:
    from foveate.dispatch import explain as explained
    from foveate.lab.trials import CALLS, numbers

    known = {operator.name: calls for operator, calls in CALLS.items()}
    if name is not None and name not in known:
        raise ValueError(f"operators are {', '.join(known)}; got {name}")
    for calls in known.values() if name is None else (known[name],):
        for run in calls(numbers("cpu")).values():
            typer.echo(f"{explained(run)}\n")
