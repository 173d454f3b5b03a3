"""A bias as some of the queries and some of the keys see it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.attention import Bias
from foveate.attention.score import ScoreFunction
from foveate.patterns.algebra import Index


@dataclass(frozen=True, eq=False)
class PartOfBias(Bias):
    """Query i of the part is the whole's ``first_query + step * i``, key j its ``first_key + j``."""

    whole: Bias
    first_query: int
    step: int
    first_key: int

    def values(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return self.whole.values(batch, head, *self._moved(q, k))

    def add_grad(self, total: Tensor, grad: Tensor, batch: Index, head: Index, q: Tensor, k: Tensor) -> None:
        self.whole.add_grad(total, grad, batch, head, *self._moved(q, k))

    def _moved(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.first_query + self.step * q, k + self.first_key


def part_of_bias(
    biases: tuple[Bias, ...],
    functions: tuple[ScoreFunction, ...],
    first_query: int,
    *,
    step: int = 1,
    first_key: int = 0,
) -> tuple[Bias | ScoreFunction, ...]:
    """The part of each of some placed biases, and of functions of scores."""
    of_biases = (PartOfBias(bias.parameter, bias, first_query, step, first_key) for bias in biases)
    return (*of_biases, *(function.part(first_query, step, first_key) for function in functions))
