"""Attention classes of transformers that do not ask for an attention function, each with a forward that does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

StandIn = Callable[..., Any]

STAND_INS: dict[tuple[str, str], StandIn] = {}
"""Stand-ins for a class's forward, by the model's package in transformers and the name of the class."""


def stand_in(module: nn.Module) -> StandIn | None:
    """The function that can take the place of a module's forward; None where it needs none or nobody knows one."""
    kind = type(module)
    package = kind.__module__.split(".")
    if package[:2] != ["transformers", "models"]:
        return None
    return STAND_INS.get((package[2], kind.__name__))
