"""The definition: one token after the other, each learning by automatic differentiation of the loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu

from foveate.dispatch import Facts, Implementation, as_it_is, nothing
from foveate.recurrence.ttt.inputs import (
    EPS,
    Call,
    InnerModel,
    Norm,
    TTTInputs,
    by_mini_batch,
    moved,
    one_further,
    with_one,
)


def run(call: Call) -> tuple[Tensor, InnerModel]:
    """Outputs (B, H, N, D), and the inner network after the last token."""
    return by_mini_batch(_by_token, call)


def _network(x: Tensor, weights: tuple[Tensor, ...], norm: Norm) -> Tensor:
    """f(x) for tokens x (B, H, n, D)."""
    z = x
    for layer, weight in enumerate(weights):
        z = with_one(gelu(z, approximate="tanh") if layer else z) @ weight
    centred = z - z.mean(-1, keepdim=True)  # written out: gradients of gradients of torch's are wrong in torch.func
    unit = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return x + unit * norm.weight + norm.bias


def _loss(weights: tuple[Tensor, ...], k: Tensor, v: Tensor, norm: Norm) -> Tensor:
    return (_network(k, weights, norm) - v).square().sum() / 2


def _by_token(inputs: TTTInputs, inner: InnerModel) -> tuple[Tensor, InnerModel]:
    """One token after the other, each learning by automatic differentiation at the mini-batch's first weights."""
    outs = []
    for t in range(inputs.q.shape[2]):
        q, k, v, eta, norm, step_scale = inputs.part(t, t + 1)
        gradients = torch.func.grad(_loss)(inner.weights, k, v, norm)
        pending = tuple(old + eta * new for old, new in zip(inner.pending, gradients, strict=True))
        outs.append(_network(q, moved(inner.weights, pending, step_scale[inner.seen]), norm))
        inner = one_further(InnerModel(inner.weights, pending, inner.seen + 1), step_scale)
    return torch.cat(outs, 2), inner


def _facts(call: Call) -> Facts:
    return {"tokens": call.inputs.q.shape[2]}


REFERENCE = Implementation("reference", nothing, as_it_is, run, facts=_facts)
