"""The truth about a problem in float64, on so few heads, queries and keys that any length can be checked."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.attend_cpu_problem import Problem
from benchmarks.field import worst_row
from foveate.patterns import Scene, resolve

SAMPLE = 16  # queries, and keys whose gradients are looked at
CHUNK = 512  # queries at a time
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 5e-2}  # of a row; one key too many in 256 is worth 6e-2


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of one tensor among what a run returned, and what they should be."""

    index: tuple[int | slice | Tensor, ...]
    expected: Tensor


class Truth:
    """What a problem's output, or each gradient, is in a sample of places.

    A window's table gathers gradients from every window, so one head is then looked at in all of them.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        batch, heads, num_queries, _ = problem.q.shape
        self.scene = Scene(num_queries, problem.k.shape[2], problem.layout or Scene(1, 1).layout)
        self.pattern = resolve(problem.pattern, self.scene)
        last = random.Random(0).randrange(heads)
        wanted_whole = problem.table is not None and problem.cotangent is not None
        self.places = [(b, last) for b in range(batch)] if wanted_whole else [(0, 0), (batch - 1, last)]
        self.parts = self._gradients() if problem.cotangent is not None else self._outputs()

    @property
    def tolerance(self) -> float:
        """Gradients, products of three rounded matrices, get twice an output's."""
        return TOLERANCE[self.problem.q.dtype] * (1 if self.problem.cotangent is None else 2)

    def error(self, results: tuple[Tensor, ...]) -> float:
        """The greatest error of any sampled row, over its length or, if that is greater, the median row's."""
        worst = []
        for result, parts in zip(results, self.parts, strict=True):
            rows = torch.cat([part.expected.flatten(0, -2) for part in parts])
            got = torch.cat([result[part.index].detach().double().flatten(0, -2) for part in parts])
            worst.append(worst_row(got, rows))
        return float(torch.stack(worst).max())  # of tensors, since it keeps NaN

    def _outputs(self) -> list[list[Part]]:
        rows = _sampled(self.scene.num_queries)
        return [[Part((b, h, rows), self._attend(b, h, rows, *self._tensors(b, h))) for b, h in self.places]]

    def _gradients(self) -> list[list[Part]]:
        """For every input, the gradients at the sampled keys and at the queries that see one of them."""
        found: list[list[Part]] = [[] for _ in self.problem.inputs]
        tables = []
        for b, h in self.places:
            keys = _sampled(self.scene.num_keys)
            rows = torch.nonzero(self._visible(b, h, torch.arange(self.scene.num_queries), keys).any(1)).squeeze(1)
            dq, dk, dv, *d_table = self._backward(b, h, rows)
            found[0].append(Part((b, h, rows), dq))
            found[1].append(Part((b, h, keys), dk[keys]))
            found[2].append(Part((b, h, keys), dv[keys]))
            tables += d_table
        if tables:
            found[3].append(Part((self.places[0][1],), torch.stack(tables).sum(0)))
        return found

    def _backward(self, b: int, h: int, rows: Tensor) -> list[Tensor]:
        """Gradients of these queries (R, D), and their contributions to those of all keys, values, and the table."""
        q, *others = (x.requires_grad_() for x in self._tensors(b, h))
        assert self.problem.cotangent is not None
        cotangent = self.problem.cotangent[b, h].double()
        for chunk in rows.split(CHUNK):
            self._attend(b, h, chunk, q, *others).backward(cotangent[chunk])
        gradients = [x.grad for x in (q, *others) if x.grad is not None]
        return [gradients[0][rows], *gradients[1:]]

    def _tensors(self, b: int, h: int) -> Iterator[Tensor]:
        """q (N, D), k and v (M, D) of one head and, if there is one, its table, in float64."""
        p = self.problem
        yield p.q[b, h].detach().double()
        for x in (p.k, p.v):
            yield x[b, h // (p.q.shape[1] // x.shape[1])].detach().double()
        if p.table is not None:
            yield p.table[h].detach().double()

    def _attend(self, b: int, h: int, rows: Tensor, q: Tensor, k: Tensor, v: Tensor, *table: Tensor) -> Tensor:
        """The formula, for some rows of one head and the keys that they see."""
        keys = torch.nonzero(self._visible(b, h, rows, torch.arange(k.shape[0])).any(0)).squeeze(1)
        logits = self.problem.scale * q[rows] @ k[keys].T
        for one in table:
            bias = self.problem.bias(one.unsqueeze(0))
            assert bias is not None
            logits = logits + bias.values(0, 0, rows.unsqueeze(1), keys)
        seen = self._visible(b, h, rows, keys)
        weights = torch.softmax(logits.masked_fill(~seen, float("-inf")), -1)
        return torch.where(seen, weights, 0.0) @ v[keys]  # zeros where nothing is seen

    def _visible(self, b: int, h: int, rows: Tensor, keys: Tensor) -> Tensor:
        """(R, K)"""
        batch, head = b % self.pattern.batches, h % self.pattern.heads
        seen = self.pattern.visible(batch, head, rows.unsqueeze(1) + self.scene.offset, keys.unsqueeze(0))
        return seen.expand(len(rows), len(keys))


def _sampled(length: int) -> Tensor:
    """The first, the last, and some between."""
    between = random.Random(length).sample(range(length), min(length, SAMPLE))
    return torch.tensor(sorted({0, length - 1, *between}))
