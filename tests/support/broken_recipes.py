"""Recipes that are each broken in one way, around a sound one: a linear layer becomes two."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from tests.support import broken_models
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from foveate.catalogue.contracts import Stage
from foveate.catalogue.registry import Reference
from foveate.catalogue.tiers import RecipeRow

BROKEN: dict[str, tuple[RecipeRow, set[str]]] = {}  # and the properties that it lacks


def imitate(student: Any, teacher: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = teacher.hidden(tokens)
    return mse_loss(student.hidden(tokens), wanted)


def predict(student: Any, teacher: Any, tokens: Tensor) -> Tensor:
    return cross_entropy(student(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class Sound:
    """First the new layers learn what the old one did, then everything learns to predict."""

    def prepare(self, model: Any) -> Any:
        student = copy.deepcopy(model)
        student.mix = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
        return student

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage("imitate", lambda name: name.startswith("mix"), imitate),
            Stage("predict", lambda name: True, predict),
        )


def tokens() -> Tensor:
    return torch.randint(16, (4, 21))


def row_of(recipe: Callable[..., Any], inherits: float = 0.75) -> RecipeRow:
    nobody = Reference("Nobody", "Nothing", "0000.00000")
    return RecipeRow(recipe.__name__, (), "none", recipe, broken_models.Sound, tokens, inherits, reference=nobody)


def broken(*lacks: str) -> Callable[[type[Sound]], type[Sound]]:
    def add(recipe: type[Sound]) -> type[Sound]:
        BROKEN[recipe.__name__] = row_of(recipe), set(lacks)
        return recipe

    return add


BROKEN["ClaimsToInheritAll"] = row_of(Sound, 0.95), {"inheritance"}


@broken("inheritance")
class StartsAnew(Sound):
    def prepare(self, model: Any) -> Any:
        return super().prepare(broken_models.Sound())


@broken("teacher")
class SharesItsEmbedding(Sound):
    def prepare(self, model: Any) -> Any:
        student = super().prepare(model)
        student.embed.weight = model.embed.weight
        return student


@broken("teacher")
class ChangesItsTeacher(Sound):
    def prepare(self, model: Any) -> Any:
        model.head.bias.data.mul_(1.01)
        return super().prepare(model)


@broken("loss")
class Unlearns(Sound):
    @property
    def stages(self) -> tuple[Stage, ...]:
        imitating, predicting = super().stages
        return imitating, Stage("predict", predicting.trains, lambda *of: 2 * predict(*of).detach() - predict(*of))


@broken("learning")
class TrainsWhatDoesNotCount(Sound):
    @property
    def stages(self) -> tuple[Stage, ...]:
        return Stage("imitate", lambda name: True, imitate), super().stages[1]


class Shifted(broken_models.Sound):
    """Computes with numbers that are not saved."""

    def hidden(self, tokens: Tensor) -> Tensor:
        return super().hidden(tokens) + self.shift

    def decode(self, token: Tensor, state: Any) -> Any:
        total, seen = state[0] + self.embed(token)[:, 0], state[1] + 1
        out = self.head(self.mix(total / seen).tanh() + self.shift).unsqueeze(1)
        return broken_models.Step(out, (total, seen))


@broken("save and load")
class ForgetsItsShift(Sound):
    def prepare(self, model: Any) -> Any:
        student = super().prepare(model)
        student.__class__, student.shift = Shifted, torch.randn(8)
        return student


@broken("decoding")
class DecodesBeside(Sound):
    def prepare(self, model: Any) -> Any:
        student = super().prepare(model)
        student.decode = lambda token, state: broken_models.Sound.decode(student, token, (state[0], state[1] + 1))
        return student
