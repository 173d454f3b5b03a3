"""Which case comes when: the n-th case of a run is a kind and a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from fuzz.cases import KINDS

SPAN = 10**10  # cases of one run's seed


@dataclass(frozen=True)
class Plan:
    """The cases of a run: number ``first``, ``first + step``, ... below ``end``, drawn from ``seed``."""

    seed: int
    kinds: tuple[str, ...]
    first: int
    step: int
    end: int

    def case(self, number: int) -> tuple[str, int]:
        """Kind and seed of a case."""
        seed = self.seed * SPAN + number
        shares = [KINDS[name].share for name in self.kinds]
        return random.Random(seed).choices(self.kinds, shares)[0], seed

    def numbers(self) -> range:
        return range(self.first, self.end, self.step)


def named(kind: str, seed: int) -> str:
    """What ``--one`` takes."""
    return f"{kind}:{seed}"
