"""The inner network of test-time training, and what it is taught by: as the implementations see them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.counting import counted_times, lacks_numbers

EPS = 1e-6  # of the layer norm inside the inner network


class Learner(NamedTuple):
    """The inner network between two tokens: its weights (B, H, fan-in + 1, fan-out), a layer each, the last row of
    each being its bias; what the unfinished mini-batch would subtract; and how many tokens that has seen."""

    weights: tuple[Tensor, ...]
    pending: tuple[Tensor, ...]
    seen: int


class Norm(NamedTuple):
    """Weight and bias (H, D) of the layer norm inside the inner network."""

    weight: Tensor
    bias: Tensor


class Lesson(NamedTuple):
    """What teaches: q, k, v (B, H, N, D), learning rates (B, H, N, 1), the norm (H, 1, D) and the pace (batch,)."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    norm: Norm
    pace: Tensor

    def part(self, first: int, end: int) -> Lesson:
        q, k, v, eta = (x[:, :, first:end] for x in self[:4])
        return Lesson(q, k, v, eta, self.norm, self.pace)


class Call(NamedTuple):
    """A call of `ttt_linear` or `ttt_mlp`, checked and in the arithmetic's dtype."""

    lesson: Lesson
    learner: Learner

    @property
    def batch(self) -> int:
        """Tokens in a mini-batch."""
        return len(self.lesson.pace)

    @property
    def mini_batches(self) -> list[tuple[int, int]]:
        """Ranges of tokens that end where a mini-batch does, after one that has seen so many."""
        length = self.lesson.q.shape[2]
        ends = [*range(self.batch - self.learner.seen, length, self.batch), length] if length else []
        return list(pairwise([0, *ends]))


def by_mini_batch(teach: Callable[[Lesson, Learner], tuple[Tensor, Learner]], call: Call) -> tuple[Tensor, Learner]:
    """Outputs (B, H, N, D), and the inner network after the last token."""
    lesson, learner = call
    outs = [lesson.q[:, :, :0]]
    for alike in _standing_for(call.mini_batches) if lacks_numbers(lesson.q) else [[one] for one in call.mini_batches]:
        with counted_times(len(alike)):
            out, learner = teach(lesson.part(*alike[0]), learner)
        outs += [out] * len(alike)
    return torch.cat(outs, 2), learner


def _standing_for(ranges: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Runs of ranges of one length, of which the first stands for all where only shapes count."""
    return [list(run) for _, run in groupby(ranges, key=lambda each: each[1] - each[0])]


def beginner(weights: tuple[Tensor, ...], batch: int) -> Learner:
    """The inner networks of a batch, (H, fan-in + 1, fan-out) each, before the first token."""
    mine = tuple(weight.expand(batch, *weight.shape) for weight in weights)
    return Learner(mine, tuple(map(torch.zeros_like, mine)), 0)


def with_one(x: Tensor) -> Tensor:
    """A one beside each row, for the bias."""
    return pad(x, (0, 1), value=1.0)


def moved(weights: tuple[Tensor, ...], pending: tuple[Tensor, ...], pace: Tensor) -> tuple[Tensor, ...]:
    return tuple(weight - pace * step for weight, step in zip(weights, pending, strict=True))


def one_further(learner: Learner, pace: Tensor) -> Learner:
    """The learner; at the end of a mini-batch with its gradients taken over into the weights."""
    if learner.seen < len(pace):
        return learner
    weights = moved(learner.weights, learner.pending, pace[-1])
    return Learner(weights, tuple(map(torch.zeros_like, weights)), 0)
