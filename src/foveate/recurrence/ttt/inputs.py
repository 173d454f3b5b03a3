"""The inner network of test-time training, and what it is trained on, as the implementations see them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.counting import counted_times, lacks_numbers

EPS = 1e-6  # of the layer norm inside the inner network


class InnerModel(NamedTuple):
    """The inner network between two tokens: its weights (B, H, fan-in + 1, fan-out), a layer each, the last row of
    each being its bias; what the unfinished mini-batch would subtract; and how many tokens that has seen."""

    weights: tuple[Tensor, ...]
    pending: tuple[Tensor, ...]
    seen: int


class Norm(NamedTuple):
    """Weight and bias (H, D) of the layer norm inside the inner network."""

    weight: Tensor
    bias: Tensor


class TTTInputs(NamedTuple):
    """Queries, keys and values (B, H, N, D), rates (B, H, N, 1), the norm (H, 1, D) and the step scale (batch,)."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    norm: Norm
    step_scale: Tensor

    def part(self, first: int, end: int) -> TTTInputs:
        q, k, v, eta = (x[:, :, first:end] for x in self[:4])
        return TTTInputs(q, k, v, eta, self.norm, self.step_scale)


class Call(NamedTuple):
    """A call of `ttt_linear` or `ttt_mlp`, checked and in the arithmetic's dtype."""

    inputs: TTTInputs
    inner: InnerModel

    @property
    def batch(self) -> int:
        """Tokens in a mini-batch."""
        return len(self.inputs.step_scale)

    @property
    def mini_batches(self) -> list[tuple[int, int]]:
        """Ranges of tokens that end where a mini-batch does, after one that has seen so many."""
        length = self.inputs.q.shape[2]
        ends = [*range(self.batch - self.inner.seen, length, self.batch), length] if length else []
        return list(pairwise([0, *ends]))


def by_mini_batch(
    teach: Callable[[TTTInputs, InnerModel], tuple[Tensor, InnerModel]], call: Call
) -> tuple[Tensor, InnerModel]:
    """Outputs (B, H, N, D), and the inner network after the last token."""
    inputs, inner = call
    outs = [inputs.q[:, :, :0]]
    for alike in _standing_for(call.mini_batches) if lacks_numbers(inputs.q) else [[one] for one in call.mini_batches]:
        with counted_times(len(alike)):
            out, inner = teach(inputs.part(*alike[0]), inner)
        outs += [out] * len(alike)
    return torch.cat(outs, 2), inner


def _standing_for(ranges: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Runs of ranges of one length, of which the first stands for all where only shapes count."""
    return [list(run) for _, run in groupby(ranges, key=lambda each: each[1] - each[0])]


def init_inner_state(weights: tuple[Tensor, ...], batch: int) -> InnerModel:
    """The inner networks of a batch, (H, fan-in + 1, fan-out) each, before the first token."""
    mine = tuple(weight.expand(batch, *weight.shape) for weight in weights)
    return InnerModel(mine, tuple(map(torch.zeros_like, mine)), 0)


def with_one(x: Tensor) -> Tensor:
    """A one beside each row, for the bias."""
    return pad(x, (0, 1), value=1.0)


def moved(weights: tuple[Tensor, ...], pending: tuple[Tensor, ...], step_scale: Tensor) -> tuple[Tensor, ...]:
    return tuple(weight - step_scale * step for weight, step in zip(weights, pending, strict=True))


def one_further(inner: InnerModel, step_scale: Tensor) -> InnerModel:
    """The learner; at the end of a mini-batch with its gradients taken over into the weights."""
    if inner.seen < len(step_scale):
        return inner
    weights = moved(inner.weights, inner.pending, step_scale[-1])
    return InnerModel(weights, tuple(map(torch.zeros_like, weights)), 0)
