"""A method to try, and the model that it is tried on; the properties are in `on_text` and `on_clips`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from foveate.catalogue.contracts import Method, Undoable


@dataclass(frozen=True)
class MethodSubject:
    """A method, its options at a budget of tests and at full budget, and a model to try it on, in float64."""

    make: Callable[..., Method]
    tiny: Mapping[str, Any]
    full_budget: Mapping[str, Any] | None
    fresh_model: Callable[[], nn.Module]

    @cached_property
    def model(self) -> Any:
        """The model of this property: what one leaves behind does not reach another."""
        return self.fresh_model().double().eval()


class Installed:
    """A method at work in a model for the length of a ``with`` block."""

    def __init__(self, subject: MethodSubject, options: Mapping[str, Any] | None = None) -> None:
        self.subject, self.options = subject, subject.tiny if options is None else options

    def __enter__(self) -> Any:
        self.change: Undoable = self.subject.make(**self.options).install(self.subject.model)
        return self.subject.model

    def __exit__(self, *_: object) -> None:
        self.change.undo()
