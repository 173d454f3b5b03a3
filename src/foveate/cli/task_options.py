"""Options of synthetic tasks, which `train` and `compare` share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from foveate.lab.tasks.kinds import Task
    from foveate.lab.tasks.run import TaskRecipe

PANEL = "Synthetic tasks"
TaskName = Annotated[
    Literal["recall", "copy", "state"] | None,
    typer.Option("--task", help="Learn a synthetic task in place of text.", rich_help_panel=PANEL),
]
QUESTIONS = ("needle", "multikey", "variables", "aggregation", "ruler")
CompareTask = Annotated[
    Literal["recall", "copy", "state", "needle", "multikey", "variables", "aggregation", "ruler"] | None,
    typer.Option(
        "--task",
        help="Learn a synthetic task (recall, copy, state), or answer questions about long texts (needle, ruler, ...; "
        "recall too with --model or --lengths).",
    ),
]
ASKED = "Questions about long texts"
Lengths = Annotated[
    str | None,
    typer.Option(help="Tokens of the texts, joined by commas, as in 1024,4096.", rich_help_panel=ASKED),
]
Depths = Annotated[
    str, typer.Option(help="Shares of the text before what is asked for, from 0 to 1.", rich_help_panel=ASKED)
]
Samples = Annotated[int, typer.Option(help="Questions of each length and depth.", rich_help_panel=ASKED)]
Pairs = Annotated[int | None, typer.Option(help="recall: pairs of a key and a value.", rich_help_panel=PANEL)]
Vocab = Annotated[int | None, typer.Option(help="recall, copy: different words.", rich_help_panel=PANEL)]
Group = Annotated[
    Literal["parity", "s5"] | None, typer.Option(help="state: the group to multiply in.", rich_help_panel=PANEL)
]
Dim = Annotated[int, typer.Option(help="Width of the model.", rich_help_panel=PANEL)]
Heads = Annotated[int, typer.Option(help="Heads of each mixer.", rich_help_panel=PANEL)]
Layers = Annotated[int, typer.Option(help="Layers of the model.", rich_help_panel=PANEL)]
Batch = Annotated[int, typer.Option(help="Sequences in a step.", rich_help_panel=PANEL)]
Steps = Annotated[int, typer.Option(help="Steps at most.", rich_help_panel=PANEL)]
Rate = Annotated[float, typer.Option("--lr", help="Highest learning rate.", rich_help_panel=PANEL)]
Rates = Annotated[
    str,
    typer.Option(
        "--lr", help="Highest learning rate; of several, joined by commas, the best counts.", rich_help_panel=PANEL
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of weights and examples.", rich_help_panel=PANEL)]


def task_and_recipe(options: dict[str, Any]) -> tuple[Task, TaskRecipe]:
    """A task and how to learn it, from a command's options by name."""
    from foveate.lab.tasks.kinds import make_task
    from foveate.lab.tasks.run import TaskRecipe

    task = make_task(options["task"], **{name: options[name] for name in ("length", "pairs", "vocab", "group")})
    shape = ("dim", "heads", "layers", "batch", "steps", "minutes", "lr", "seed")
    return task, TaskRecipe(**{name: options[name] for name in shape})


def rates_of(text: str) -> list[float]:
    """Learning rates from numbers joined by commas.

    >>> rates_of("0.003, 0.01")
    [0.003, 0.01]
    """
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise ValueError(f"--lr takes numbers above 0, joined by commas, as in 0.003,0.01; got {text!r}")
    return rates


def numbers(text: str, option: str, *, whole: bool = False) -> list[float]:
    """Numbers joined by commas; ValueError, naming the option, for anything else.

    >>> numbers("1024, 4096", "--lengths", whole=True), numbers("0,0.5", "--depths")
    ([1024.0, 4096.0], [0.0, 0.5])
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= one < 2**53 and (not whole or one == int(one)) for one in found):
        kind, example = ("whole numbers", "1024,4096") if whole else ("numbers", "0,0.5,1")
        raise ValueError(f"{option} takes {kind} joined by commas, as in {example}; got {text!r}")
    return found


def model_given(context: typer.Context) -> bool:
    """Whether a model was named on the command line."""
    return _is_given(context, "model")


def refuse(context: typer.Context, names: Iterable[str], why: str) -> None:
    """A ValueError where an option was given that would be ignored."""
    given = [name for name in names if _is_given(context, name)]
    flags = [flag for param in context.command.params if param.name in given for flag in param.opts[:1]]
    if flags:
        raise ValueError(f"{' and '.join(flags)} {'goes' if len(flags) == 1 else 'go'} {why}")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
