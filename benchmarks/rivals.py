"""Contenders other than ours.

A rival looks at a problem once, untimed (masks, compilation), and gives what is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

ROOM = 4e9  # bytes that a rival may take for itself


class Unfit(Exception):
    """Why a rival is not run on a problem."""


@dataclass(frozen=True)
class Rival:
    """A contender by name; spellings of one are told apart after a comma."""

    label: str
    prepare: Callable[[Any], Callable[..., Tensor]]  # of the benchmark's own problems


def needs(num_bytes: float) -> None:
    """Refuse what takes too much memory."""
    if num_bytes > ROOM:
        raise Unfit(f"it would take {num_bytes / 1e9:.0f} GB")
