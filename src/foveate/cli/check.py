"""`foveate check`: the suite of its tier on one row, the catalogue's or a mixer of the user's own."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.complete import mechanisms
from foveate.cli.screen import FAILED, out

HELP = """Put a row of the catalogue to every property that its tier asks or it lays claim to.

Gradients, causality, decoding, packed sequences, padding, costs and more.
Status 1 if one fails. MODULE:CLASS is a registered mixer of your own;
modules are also looked for in the current folder.

[bold]Examples[/bold]

  foveate check streaming_llm
  foveate check streaming_llm --tier inference
  foveate check ravlt
  foveate check my_mixers:Gaussian --seed 7
"""


def check(
    mechanism: Annotated[
        str, typer.Argument(metavar="NAME|MODULE:CLASS", help="What to check.", autocompletion=mechanisms)
    ],
    seed: Annotated[int | None, typer.Option(help="Of all random numbers; a fresh one unless given.")] = None,
    tier: Annotated[
        str | None, typer.Option(help="Of which tier, where it is of two: inference, for an operator as a method.")
    ] = None,
) -> None:
    from foveate.testing import check_mixer, check_row

    module, colon, name = mechanism.partition(":")
    if colon:
        report = check_mixer(_own(module, name), seed=seed, raise_on_failure=False)
    else:
        report = check_row(mechanism, tier=tier, seed=seed, raise_on_failure=False)
    out().print(report)
    if not report.ok:
        raise typer.Exit(FAILED)


def _own(module: str, name: str) -> Any:
    """A class of the user's own module."""
    if not module or not name:
        raise ValueError(f"MODULE:CLASS is like my_mixers:Gaussian; got {f'{module}:{name}'!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise ValueError(f"no module is called {error.name!r} here; MODULE:CLASS is like my_mixers:Gaussian") from error
    except AttributeError as error:
        raise ValueError(f"{module} has no class called {name!r}") from error
