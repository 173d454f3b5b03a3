"""Attention classes of transformers that do not ask for an attention function, each with a forward that does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from foveate.adapt.hf.classes import decoders, encoders, vision

StandIn = Callable[..., Any]

STAND_INS: dict[tuple[str, str], StandIn] = {**decoders.STAND_INS, **encoders.STAND_INS, **vision.STAND_INS}
"""Stand-ins for a class's forward, by the model's package in transformers and the name of the class."""

REASONS = {
    "LongformerSelfAttention": "its window and its global tokens have projections of their own",
    "BigBirdBlockSparseAttention": 'its blocks are its own; attention_type="original_full" can be replaced',
    "NystromformerSelfAttention": "it approximates its weights and never forms their scores",
    "YosoSelfAttention": "it estimates its weights by hashing and never forms their scores",
}
"""Why an attention class cannot be served, where there is more to say than that it is not known."""


def stand_in(module: nn.Module) -> StandIn | None:
    """The function that can take the place of a module's forward; None where it needs none or nobody knows one."""
    kind = type(module)
    package = kind.__module__.split(".")
    if package[:2] != ["transformers", "models"] or getattr(module, "talking_head", False):
        return None
    return STAND_INS.get((package[2], kind.__name__))
