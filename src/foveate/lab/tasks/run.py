"""One model learning one task: fresh examples, a curriculum, and a checkpoint from which it goes on as before."""

from __future__ import annotations

import math
import random
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import foveate
from foveate.lab.measure import machine
from foveate.lab.tasks.kinds import Batch, Task
from foveate.lab.tasks.model import TaskModel
from foveate.lab.train.resumable import Resumable, read_state

LOG_EVERY_STEPS = 10
LEARNED, SOLVED = 0.95, 0.995  # accuracy at which a stage, and the whole task, is done with
MEMORY = 0.9  # of the running mean of accuracy over steps
HELD_OUT = 2**31  # seeds from here on are for judging; a generator takes 32 bits


@dataclass(frozen=True)
class TaskRecipe:
    """The model's shape, and how it learns. The run ends when its steps, its minutes or the task are done."""

    dim: int = 32
    heads: int = 1
    layers: int = 2
    batch: int = 32
    steps: int = 2000
    minutes: float | None = None
    lr: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0
    stages: tuple[int, ...] = (8, 4, 2, 1)
    share: float = 0.15  # of the run that a stage may take at most before the last

    def __post_init__(self) -> None:
        for name in ("dim", "heads", "layers", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is 1 or more, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is a number above 0, got {self.lr}")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes must be more than 0, got {self.minutes}: leave it out for no limit of time")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is a number from 0 up to 2**63, got {self.seed}")

    def rate(self, step: int, progress: float) -> float:
        """The learning rate: a linear warm-up, a plateau, a linear decay to a tenth over the last half."""
        return self.lr * min(1.0, (step + 1) / self.warmup) * max(0.1, min(1.0, 2 * (1 - progress)))


class Point(NamedTuple):
    """A point of the learning curve: means over the steps since the last one, on examples never seen before."""

    step: int
    seconds: float
    length: int
    loss: float
    accuracy: float


class TaskRun(Resumable):
    """Model, optimiser and curriculum; ``step_once`` moves them, ``save`` and ``load`` keep them."""

    def __init__(self, task: Task, mixer: str, recipe: TaskRecipe, checkpoint: Path | None = None) -> None:
        super().__init__(checkpoint, recipe.steps, recipe.minutes)
        self.task, self.mixer, self.recipe = task, mixer, recipe
        torch.manual_seed(recipe.seed)
        shape = {"dim": recipe.dim, "heads": recipe.heads, "layers": recipe.layers}
        self.model = TaskModel(mixer, vocabulary=task.vocabulary, **shape)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.stages = list(dict.fromkeys(task.shrunk(factor) for factor in recipe.stages))
        self.stage, self.stage_began, self.running = 0, 0.0, 0.0
        self.curve: list[Point] = []
        self.recent: list[tuple[float, float]] = []

    @property
    def solved(self) -> bool:
        return self.stage == len(self.stages) - 1 and self.running >= SOLVED

    def points(self) -> Iterator[Point]:
        """Learn until the run is over; a point of the curve every few steps."""
        while self.progress() < 1 and not self.solved:
            self.step_once()
            if self.step % LOG_EVERY_STEPS == 0:
                yield self._log()
            self.save_when_due()

    def step_once(self) -> None:
        """One update of the weights on fresh examples, and perhaps a stage further."""
        progress = self.progress()
        loss, accuracy = self.model.judge(self.batch(self.stages[self.stage], self.step))
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step, progress)
        self.optimizer.step()
        self.step += 1
        self.recent.append((loss.item(), accuracy.item()))
        self.running = MEMORY * self.running + (1 - MEMORY) * accuracy.item()
        if self.stage < len(self.stages) - 1:
            self._advance(progress)

    def _advance(self, progress: float) -> None:
        if self.running >= LEARNED or progress - self.stage_began >= self.recipe.share:
            self.stage, self.stage_began, self.running = self.stage + 1, progress, 0.0

    def batch(self, task: Task, number: int, *, held_out: bool = False) -> Batch:
        """Examples of a step, or those to judge by: no seed is used for both."""
        mixed = random.Random(f"{self.recipe.seed} {number}").randrange(HELD_OUT)
        return task.batch(self.recipe.batch, torch.Generator().manual_seed(mixed + HELD_OUT * held_out))

    def _log(self) -> Point:
        losses, accuracies = zip(*self.recent, strict=True)
        means = (round(sum(values) / len(values), 4) for values in (losses, accuracies))
        point = Point(self.step, round(self.elapsed(), 1), self.stages[self.stage].length, *means)
        self.curve.append(point)
        self.recent = []
        return point

    @torch.no_grad()
    def accuracy(self, batches: int = 32) -> float:
        """The share of right answers at full length, on examples made from seeds that training never uses."""
        examples = (self.batch(self.task, number, held_out=True) for number in range(batches))
        return sum(self.model.judge(batch)[1].item() for batch in examples) / batches

    def result(self) -> dict[str, Any]:
        """What was learned, ready for JSON."""
        return {
            "mixer": self.mixer,
            "accuracy": round(self.accuracy(), 5),
            "state_bytes": self.model.state_bytes(self.task.length),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "steps": self.step,
            "seconds": round(self.elapsed(), 1),
            "solved": self.solved,
            "curve": [point._asdict() for point in self.curve],
        }

    def about(self) -> dict[str, Any]:
        """What results must have in common to be compared."""
        return about(self.task, self.recipe)

    # ---- the checkpoint --------------------------------------------------------------------------------------

    _KEPT = ("stage", "stage_began", "running")

    def state(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in self._KEPT}
        state |= {"about": {"mixer": self.mixer, **self.about()}, "recent": self.recent}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state | {"curve": [tuple(point) for point in self.curve]}

    def load(self) -> bool:
        """Go back to the checkpoint; whether it was one of this run."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return False
        state = read_state(self.checkpoint)
        if state.get("about") != {"mixer": self.mixer, **self.about()}:
            return False
        self.resumed(state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in self._KEPT:
            setattr(self, name, state[name])
        self.recent = list(state["recent"])
        self.curve = [Point(*point) for point in state["curve"]]
        return True


def about(task: Task, recipe: TaskRecipe) -> dict[str, Any]:
    """A task and a recipe as plain values."""
    return {"task": {"name": task.name, **asdict(task)}, "recipe": {**asdict(recipe), "stages": list(recipe.stages)}}


def origin(task: Task, recipe: TaskRecipe, verb: str, mixers: list[str], rates: Sequence[float] = ()) -> dict[str, Any]:
    """Where, with what and by which command results were made."""
    command = command_line(task, recipe, verb, mixers, rates)
    return {"command": command, "foveate": foveate.__version__, "machine": machine.describe()}


def command_line(task: Task, recipe: TaskRecipe, verb: str, mixers: list[str], rates: Sequence[float] = ()) -> str:
    """The command that does the same again, but for options that no command has.

    >>> from foveate.lab.tasks.kinds import Copy
    >>> command_line(Copy(vocab=9), TaskRecipe(), "train", ["gla"]).partition(" --dim")[0]
    'foveate train --task copy --mixer gla --length 128 --vocab 9'
    """
    fixed = {"power", "warmup", "weight_decay", "clip", "stages", "share"}
    options = {key: value for key, value in {**asdict(task), **asdict(recipe)}.items() if key not in fixed}
    options["lr"] = ",".join(f"{rate:g}" for rate in rates or [recipe.lr])
    named = [part for name in mixers for part in ("--mixer" if verb == "train" else "-m", name)]
    given = [part for key, value in options.items() if value is not None for part in (f"--{key}", str(value))]
    return shlex.join(["foveate", verb, "--task", task.name, *named, *given])
