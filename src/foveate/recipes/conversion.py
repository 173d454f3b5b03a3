"""What recipes return that change modules of a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from foveate.catalogue.contracts import Stage


@dataclass(frozen=True)
class Conversion:
    """A recipe: ``convert`` changes a copy of the model in place, ``stages`` train it."""

    convert: Callable[[nn.Module], None]
    stages: tuple[Stage, ...]

    def prepare(self, model: nn.Module) -> nn.Module:
        """The student, with the weights that it inherits; the model itself stays as it is."""
        student = copy.deepcopy(model)
        self.convert(student)
        return student


def exchange(model: nn.Module, kind: type[nn.Module], new: Callable[[Any], nn.Module]) -> None:
    """Put ``new(module)`` in the place of each module of a kind; ValueError where there is none."""
    names = [name for name, module in model.named_modules() if name and isinstance(module, kind)]
    if not names:
        raise ValueError(f"the model has no {kind.__name__} to exchange")
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, new(owner.get_submodule(child)))


def next_token_loss(student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy of each next token (B, N); the teacher has no say."""
    return cross_entropy(student(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
