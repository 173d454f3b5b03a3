"""`foveate train`: a small language model from the text of this machine, or any mixer on a synthetic task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from foveate.cli.complete import mechanisms
from foveate.cli.screen import STOPPED, complain, say
from foveate.cli.task_options import (
    PANEL,
    Batch,
    Dim,
    Group,
    Heads,
    Layers,
    Pairs,
    Rate,
    Seed,
    Steps,
    TaskName,
    Vocab,
    refuse,
    task_and_recipe,
)

HELP = """Train a small language model on permissively licensed code of this machine.

It can be stopped at any time (Ctrl-C), and goes on from there when it is
called again with the same folder.

With --task, any causal mechanism of the catalogue learns a synthetic task
instead, in minutes: recall (values of keys seen before, as in Zoology),
copy, or state (running products in a group).

[bold]Examples[/bold]

  foveate train --preset tiny            seconds, to see it work
  foveate train --minutes 30             like the model that ships
  foveate compare --model runs/builtin/model

  foveate train --task recall --mixer deltanet --length 64 --pairs 4
  foveate train --task state --group s5 --mixer gated_deltanet
"""

TASK_ONLY = ("mixer", "length", "pairs", "vocab", "group", "dim", "heads", "layers", "batch", "steps", "lr", "seed")


def train(
    context: typer.Context,
    preset: Annotated[Literal["builtin", "tiny"], typer.Option(help="Which model to make.")] = "builtin",
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run; runs/PRESET or runs/TASK-MIXER unless given.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop the schedule after this long.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in the folder, or start over.")] = True,
    task: TaskName = None,
    mixer: Annotated[
        str,
        typer.Option(
            help="A mechanism that is causal, with options or without.",
            rich_help_panel=PANEL,
            autocompletion=mechanisms,
        ),
    ] = "gated_deltanet",
    length: Annotated[
        int | None, typer.Option(help="Tokens in a sequence: recall 256, copy 128, state 64.", rich_help_panel=PANEL)
    ] = None,
    pairs: Pairs = None,
    vocab: Vocab = None,
    group: Group = None,
    dim: Dim = 32,
    heads: Heads = 1,
    layers: Layers = 2,
    batch: Batch = 32,
    steps: Steps = 2000,
    lr: Rate = 3e-3,
    seed: Seed = 0,
) -> None:
    if task is None:
        refuse(context, TASK_ONLY, "with --task (recall, copy or state)")
        return _train_model(preset, folder, minutes, resume)
    refuse(context, ["preset"], "with a language model, not with --task")
    _train_task(context.params, folder or Path("runs") / _name(task, mixer), resume)


def _train_model(preset: str, folder: Path | None, minutes: float | None, resume: bool) -> None:
    from foveate.lab.train.loop import Recipe
    from foveate.lab.train.loop import train as run_training

    recipe = {"builtin": Recipe.builtin, "tiny": Recipe.tiny}[preset]()
    run = run_training(recipe, folder or Path("runs") / preset, minutes=minutes, resume=resume)
    if not _finished(run):
        complain(f"Stopped. The run is kept in {run}; the same command goes on from there.")
        raise typer.Exit(STOPPED)
    say(f"The model is in {run / 'model'}; its card is {run / 'model' / 'README.md'}")


def _train_task(options: dict[str, Any], folder: Path, resume: bool) -> None:
    from foveate.lab.compare.words import percent, seconds, size
    from foveate.lab.tasks.teach import CURVE, RESULT, train_task

    task, recipe = task_and_recipe(options)
    result = train_task(task, options["mixer"], folder, recipe, resume=resume)
    if result is None:
        complain(f"Stopped. The run is kept in {folder}; the same command goes on from there.")
        raise typer.Exit(STOPPED)
    learned = f"{percent(result['accuracy'])} right after {result['steps']:,} steps ({seconds(result['seconds'])})"
    state = f"a state of {size(result['state_bytes'])} for {task.length:,} tokens"
    say(f"{options['mixer']}: {learned}, with {state}")
    say(f"Figures: {folder / RESULT}; the curve: {folder / CURVE}")


def _name(task: str, mixer: str) -> str:
    """A folder's name, without signs that a shell reads.

    >>> _name("recall", "gated_deltanet(conv=0)")
    'recall-gated_deltanet-conv-0'
    """
    kept = "".join(sign if sign.isalnum() or sign == "_" else " " for sign in mixer)
    return "-".join([task, *kept.split()])


def _finished(run: Path) -> bool:
    """Whether the model was written after the last checkpoint."""
    model, checkpoint = run / "model" / "model.safetensors", run / "checkpoint.pt"
    return model.exists() and model.stat().st_mtime >= checkpoint.stat().st_mtime
