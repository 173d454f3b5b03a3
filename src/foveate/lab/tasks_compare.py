"""Several mixers on one task, one after the other: how much each recalls, and what it keeps for that.

foveate compare --task recall -m deltanet -m linear_transformer
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.lab.results import write_whole
from foveate.lab.results_words import count, percent, seconds, size
from foveate.lab.tasks import Task
from foveate.lab.tasks_plot import draw, in_words
from foveate.lab.tasks_run import TaskRecipe, TaskRun, about, origin
from foveate.lab.tasks_train import learn
from foveate.mixers import registry

if TYPE_CHECKING:
    from rich.table import Table

USUAL = (
    "flash_attention",
    "linear_transformer",
    "based_linear",
    "lightning_attention_2",
    "gla",
    "mamba2",
    "deltanet",
    "gated_deltanet",
    "rwkv7",
)


def compare_task(
    task: Task,
    mixers: Sequence[str] | None = None,
    *,
    out: Path,
    recipe: TaskRecipe | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Teach the same small model the task with each mixer; figures, written to ``out`` after each.

    ``out`` gets ``TASK.json`` and ``TASK.svg``. ``mixers`` are names with options or without; None takes exact
    attention and the best-known linear forms. One that fails is noted with its reason. SIGINT and SIGTERM end it
    early, ``interrupted`` says so; with ``resume`` it goes on from there, in the middle of a mixer too.

    Raises ValueError for what is no causal mixer, before any is taught, and where ``resume`` finds another
    task or recipe.
    """
    recipe = recipe or TaskRecipe()
    names = list(dict.fromkeys(mixers or usual()))
    file, checkpoint = out / f"{task.name}.json", out / f".{task.name}.checkpoint"
    runs = [lambda name=name: TaskRun(task, name, recipe, checkpoint) for name in names]
    for run in runs:
        run()
    out.mkdir(parents=True, exist_ok=True)
    found = _before(file, task, recipe) if resume else None
    results = found["results"] if found else []
    done = [result["mixer"] for result in results]
    found = {**origin(task, recipe, "compare", list(dict.fromkeys(done + names))), **about(task, recipe)}
    found |= {"interrupted": False, "failed": [], "results": results}
    if not resume:
        checkpoint.unlink(missing_ok=True)
    for name, run in zip(names, runs, strict=True):
        if name not in done:
            found["interrupted"] = not _teach(run(), found, progress)
            _write(out, task, found)
        if found["interrupted"]:
            return found
    _write(out, task, found)
    return found


def usual() -> list[str]:
    """The mixers that are compared unless others are named."""
    known = {row.name for row in registry.rows()}
    return [name for name in USUAL if name in known]


def table(task: Task, found: dict[str, Any]) -> Table:
    """All mixers, the best first and of equals the one that keeps less."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    failed = [f"Not measured: {one['mixer']} ({one['reason']})." for one in found["failed"]]
    drawn = Table(title=in_words(task), title_justify="left", box=SIMPLE_HEAD)
    drawn.caption, drawn.caption_justify = escape("\n".join(failed)), "left"
    drawn.add_column("mixer", overflow="fold")
    for column in ("right", "state", "parameters", "steps", "time"):
        drawn.add_column(column, justify="right", no_wrap=True)
    for result in sorted(found["results"], key=lambda result: (-result["accuracy"], result["state_bytes"])):
        drawn.add_row(result["mixer"], *row(result))
    return drawn


def row(result: dict[str, Any]) -> list[str]:
    """The cells of one mixer after its name."""
    steps = f"{result['steps']:,}" + ("" if result["solved"] else " (all)")
    cells = [percent(result["accuracy"]), size(result["state_bytes"]), count(result["parameters"])]
    return [*cells, steps, seconds(result["seconds"])]


def _teach(run: TaskRun, found: dict[str, Any], progress: bool) -> bool:
    """Whether the run is over; what came of it is then among the results, or among those that failed."""
    run.load()
    try:
        over = learn(run, progress=progress, label=run.mixer)
        if over:
            found["results"].append(run.result())
        return over
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        found["failed"].append({"mixer": run.mixer, "reason": str(error).partition("\n")[0] or type(error).__name__})
        return True


def _write(out: Path, task: Task, found: dict[str, Any]) -> None:
    write_whole(out / f"{task.name}.json", json.dumps(found, indent=1) + "\n")
    if not found["interrupted"]:
        write_whole(out / f"{task.name}.svg", draw(task, found["results"]))
        (out / f".{task.name}.checkpoint").unlink(missing_ok=True)


def _before(file: Path, task: Task, recipe: TaskRecipe) -> dict[str, Any] | None:
    """What the folder holds already; ValueError where it is of another task or recipe."""
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    other = [name for name, value in about(task, recipe).items() if found[name] != value]
    if other:
        raise ValueError(f"{file} holds results of another {' and '.join(other)}: choose another --out, or begin anew")
    return found
