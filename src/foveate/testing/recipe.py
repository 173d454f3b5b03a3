"""check_recipe: what every recipe of the catalogue must hold to, on its own small teacher."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.catalogue.contracts import Recipe, Stage
from foveate.catalogue.tiers import RecipeRow
from foveate.testing.report import Report, Skip
from foveate.testing.suite import Property, assert_equal, row_of, run_suite, same_bits

STEPS = 24
CLOSE = 1e-4  # of float32, in which students are trained


@dataclass(frozen=True)
class RecipeSubject:
    """A recipe, a teacher and a batch to try it on."""

    row: RecipeRow

    @cached_property
    def recipe(self) -> Recipe:
        return self.row.make(**self.row.tiny)

    @cached_property
    def teacher(self) -> nn.Module:
        return self.row.teacher().eval()

    @cached_property
    def batch(self) -> Any:
        return self.row.batch()

    def student(self) -> nn.Module:
        return self.recipe.prepare(self.teacher)

    def loss(self, stage: Stage, student: nn.Module) -> Tensor:
        return stage.loss(student, self.teacher, self.batch)


def check_recipe(
    recipe: RecipeRow | str | Callable[..., Recipe], *, seed: int | None = None, raise_on_failure: bool = True
) -> Report:
    """Put a recipe of the catalogue to every property that recipes hold to, on its row's ``teacher`` and ``batch``.

    The student begins with the teacher's weights, at least the share that the row says, and the teacher stays as it is;
    each stage's loss falls on one batch, and all that it trains learns; what is saved (safetensors) and loaded computes
    the same bits; a student that decodes gives token by token what it gives as a whole.

    Args:
        recipe: its row, its name or the function that makes it.
        seed: of all random numbers; a fresh one by default. Every failure names it.
        raise_on_failure: whether a failure raises, or is only reported.

    Raises AssertionError naming each property that fails, with the numbers and the seed; TypeError for what is no
    recipe of the catalogue.
    """
    row = row_of(recipe, RecipeRow, "check_recipe")
    return run_suite(
        row.name, RecipeSubject(row), PROPERTIES, exempt=row.exempt, seed=seed, raise_on_failure=raise_on_failure
    )


def inheritance(subject: RecipeSubject) -> None:
    """The student begins with the teacher's numbers, as many as the row says at least."""
    theirs = {bits(value) for value in subject.student().state_dict().values()}
    told = [value for value in subject.teacher.state_dict().values() if len(value.unique()) > 1]  # ones say nothing
    whole, kept = (
        sum(value.numel() for value in told if bits(value) in among) for among in (set(map(bits, told)), theirs)
    )
    assert kept >= subject.row.inherits * whole, (
        f"of the teacher's {whole} numbers the student has {kept}, not {subject.row.inherits:.0%}"
    )


def bits(value: Tensor) -> tuple[Any, ...]:
    return value.dtype, tuple(value.shape), value.detach().contiguous().view(torch.uint8).numpy().tobytes()


def teacher(subject: RecipeSubject) -> None:
    """The model that the recipe begins with stays as it is, and shares no memory with the student."""
    model = subject.teacher
    before = {name: value.clone() for name, value in model.state_dict().items()}
    student = subject.student()
    after = model.state_dict()
    assert after.keys() == before.keys(), "the teacher has other parameters than before"
    changed = [name for name, value in before.items() if not same_bits(after[name], value)]
    assert not changed, f"of the teacher changed: {', '.join(changed)}"
    there = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shared = [name for name, value in student.named_parameters() if value.untyped_storage().data_ptr() in there]
    assert not shared, f"what trains the student trains its teacher: they share {', '.join(shared)}"


def loss(subject: RecipeSubject) -> None:
    """Each stage's loss falls, on one batch, in a few steps at the recipe's rate."""
    for stage, student in _stages(subject):
        losses = _train(subject, stage, student)
        third = STEPS // 3
        first, last = sum(losses[:third]) / third, sum(losses[-third:]) / third
        assert last < first, f"{stage.name}: the loss goes from {first:.6g} to {last:.6g} in {STEPS} steps"


def learning(subject: RecipeSubject) -> None:
    """Everything that a stage says it trains changes in it."""
    for stage, student in _stages(subject):
        before = {name: value.detach().clone() for name, value in student.named_parameters()}
        _train(subject, stage, student, steps=3)
        idle = [
            name
            for name, value in student.named_parameters()
            if stage.trains(name) and torch.equal(value, before[name])
        ]
        assert not idle, f"{stage.name} does not train {', '.join(idle)}"


def save_and_load(subject: RecipeSubject) -> None:
    """A trained student that is saved, and loaded into one newly prepared, has the same losses, bit for bit."""
    try:
        from safetensors.torch import load_model, save_model
    except ImportError:
        raise Skip("safetensors is not installed") from None
    first, second = subject.student(), subject.student()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student.safetensors"
        save_model(first, str(path))
        missing, unexpected = load_model(second, str(path))
    assert not missing and not unexpected, f"missing {missing}, unexpected {unexpected}"
    for stage in subject.recipe.stages:
        with torch.no_grad():
            saved, loaded = (subject.loss(stage, student.eval()) for student in (first, second))
        assert same_bits(saved, loaded), f"{stage.name}: {loaded.item()} where the student saved has {saved.item()}"


@torch.no_grad()
def decoding(subject: RecipeSubject) -> None:
    """A student that decodes gives token by token, with its state or cache, what it gives as a whole."""
    student: Any = subject.student().eval()
    tokens = _tokens(subject.batch)
    if tokens is None or not (hasattr(student, "generate") or hasattr(student, "init_state")):
        raise Skip("the student does not decode")
    prompt = tokens.shape[1] // 2
    whole = student(tokens)
    whole = getattr(whole, "logits", whole)
    steps = _with_cache if hasattr(student, "generate") else _with_state
    for at, out in steps(student, tokens, prompt):
        assert_equal(out, whole[:, at], f"token {at}", CLOSE)


def _with_cache(student: Any, tokens: Tensor, prompt: int) -> Iterator[tuple[int, Tensor]]:
    out = student(tokens[:, :prompt], use_cache=True)
    yield prompt - 1, out.logits[:, -1]
    for at in range(prompt, tokens.shape[1]):
        out = student(tokens[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        yield at, out.logits[:, -1]


def _with_state(student: Any, tokens: Tensor, prompt: int) -> Iterator[tuple[int, Tensor]]:
    out, state = student.prefill(tokens[:, :prompt], student.init_state(len(tokens)))
    yield prompt - 1, out[:, -1]
    for at in range(prompt, tokens.shape[1]):
        out, state = student.decode(tokens[:, at : at + 1], state)
        yield at, out[:, -1]


def _tokens(batch: Any) -> Tensor | None:
    """The tokens (B, N) of a batch, if there are any."""
    found = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    return found if isinstance(found, Tensor) and found.dim() == 2 and not found.is_floating_point() else None


def _stages(subject: RecipeSubject) -> Iterator[tuple[Stage, nn.Module]]:
    assert subject.recipe.stages, "the recipe has no stages"
    for stage in subject.recipe.stages:
        yield stage, subject.student()


def _train(subject: RecipeSubject, stage: Stage, student: nn.Module, steps: int = STEPS) -> list[float]:
    """Losses of a few steps of Adam on the parameters of a stage."""
    learning = [parameter for name, parameter in student.named_parameters() if stage.trains(name)]
    assert learning, f"{stage.name} trains nothing"
    optimizer = torch.optim.Adam(learning, lr=stage.lr)
    losses = []
    for _ in range(steps):
        value = subject.loss(stage, student)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


PROPERTIES = (
    Property("inheritance", inheritance),
    Property("teacher", teacher),
    Property("loss", loss),
    Property("learning", learning),
    Property("save and load", save_and_load),
    Property("decoding", decoding),
)
