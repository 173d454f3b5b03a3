"""A bias as some of the queries and some of the keys see it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from foveate.attention import Bias
from foveate.attention.bias import Alibi, Dense, RelativeTable
from foveate.patterns.algebra import Index


@dataclass(frozen=True, eq=False)
class PartOfBias(Bias):
    """Query i of the part is the whole's ``first_query + step * i``, key j its ``first_key + j``."""

    whole: Bias
    first_query: int
    step: int
    first_key: int

    def index(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return self.whole.index(batch, head, self.first_query + self.step * q, k + self.first_key)

    def factor(self, q: Tensor, k: Tensor) -> Tensor | None:
        return self.whole.factor(self.first_query + self.step * q, k + self.first_key)


def part_of_bias(bias: Bias | None, first_query: int, *, step: int = 1, first_key: int = 0) -> Bias | None:
    """The part of a placed bias, if there is one."""
    return None if bias is None else PartOfBias(bias.parameter, bias, first_query, step, first_key)


def placed(bias: Tensor | Bias | None, offset: int) -> Bias | None:
    """A bias that knows that query 0 sits at position ``offset`` of the keys."""
    if isinstance(bias, Tensor):
        return Dense(bias[(None,) * (4 - bias.dim())])
    return replace(bias, offset=offset) if isinstance(bias, (Alibi, RelativeTable)) else bias
