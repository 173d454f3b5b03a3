"""`foveate train`: a small language model from the text of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from foveate.cli.screen import STOPPED, complain, out

HELP = """Train a small language model on permissively licensed code of this machine.

It can be stopped at any time (Ctrl-C), and goes on from there when it is
called again with the same folder.

[bold]Examples[/bold]

  foveate train --preset tiny            seconds, to see it work
  foveate train --minutes 30             like the model that ships
  foveate compare --model runs/builtin/model
"""


def train(
    preset: Annotated[Literal["builtin", "tiny"], typer.Option(help="Which model to make.")] = "builtin",
    folder: Annotated[Path | None, typer.Option("--out", help="Folder of the run; runs/PRESET unless given.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop the schedule after this long.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in the folder, or start over.")] = True,
) -> None:
    from foveate.lab.train import Recipe
    from foveate.lab.train import train as run_training

    recipe = {"builtin": Recipe.builtin, "tiny": Recipe.tiny}[preset]()
    run = run_training(recipe, folder or Path("runs") / preset, minutes=minutes, resume=resume)
    if not _finished(run):
        complain(f"Stopped. The run is kept in {run}; the same command goes on from there.")
        raise typer.Exit(STOPPED)
    out().print(f"The model is in {run / 'model'}; its card is {run / 'model' / 'README.md'}", soft_wrap=True)


def _finished(run: Path) -> bool:
    """Whether the model was written after the last checkpoint."""
    model, checkpoint = run / "model" / "model.safetensors", run / "checkpoint.pt"
    return model.exists() and model.stat().st_mtime >= checkpoint.stat().st_mtime
