"""The same a mini-batch at a time, by matrix products: the dual form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from foveate.dispatch import Facts, Implementation, as_it_is, nothing
from foveate.recurrence.ttt.inputs import EPS, Call, InnerModel, TTTInputs, by_mini_batch, one_further, with_one


def run(call: Call) -> tuple[Tensor, InnerModel]:
    """Outputs (B, H, N, D), and the inner network after the last token."""
    return by_mini_batch(_by_batch, call)


def _by_batch(inputs: TTTInputs, inner: InnerModel) -> tuple[Tensor, InnerModel]:
    """Tokens of one mini-batch at once: what their gradients do to a query is attention with weights q k^T."""
    layer_inputs, slopes = _backward(inputs, inner.weights)
    places = slice(inner.seen, inner.seen + inputs.q.shape[2])
    step_scale = inputs.step_scale[places, None]  # (n, 1)
    x, z, pending = inputs.q, inputs.q, []
    layers = zip(layer_inputs, slopes, inner.weights, inner.pending, strict=True)
    for layer, (seen, slope, weight, before) in enumerate(layers):
        x = with_one(gelu(z, approximate="tanh") if layer else z)  # (B, H, n, fan-in + 1)
        taught = inputs.eta * slope
        z = x @ weight - step_scale * (x @ before + (x @ seen.mT).tril() @ taught)
        pending.append(before + seen.mT @ taught)
    out = inputs.q + normed(z) * inputs.norm.weight + inputs.norm.bias
    return out, one_further(InnerModel(inner.weights, tuple(pending), places.stop), inputs.step_scale)


def _backward(inputs: TTTInputs, weights: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Each layer's inputs (B, H, n, fan-in + 1), and the loss's gradients by its outputs (B, H, n, fan-out)."""
    layer_inputs, outputs, z = [], [], inputs.k
    for layer, weight in enumerate(weights):
        layer_inputs.append(with_one(gelu(z, approximate="tanh") if layer else z))
        z = layer_inputs[-1] @ weight
        outputs.append(z)
    slopes = [_slope_of_norm(z, inputs)]
    for weight, z in zip(reversed(weights[1:]), reversed(outputs[:-1]), strict=True):
        slopes.append(slopes[-1] @ weight[..., :-1, :].mT * _slope_of_gelu(z))
    return layer_inputs, slopes[::-1]


def _slope_of_norm(z: Tensor, inputs: TTTInputs) -> Tensor:
    """The gradient of |k + LN(z) - v|^2 / 2 by z."""
    centred = z - z.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    unit = centred / spread
    error = (inputs.k + unit * inputs.norm.weight + inputs.norm.bias - inputs.v) * inputs.norm.weight
    along = (error * unit).mean(-1, keepdim=True)
    return (error - error.mean(-1, keepdim=True) - unit * along) / spread


def _slope_of_gelu(z: Tensor) -> Tensor:
    """The derivative of GELU's tanh form."""
    root, cubic = (2 / torch.pi) ** 0.5, 0.044715
    tanh = (root * (z + cubic * z**3)).tanh()
    return (1 + tanh) / 2 + z * (1 - tanh.square()) * root * (1 + 3 * cubic * z.square()) / 2


def normed(z: Tensor) -> Tensor:
    return layer_norm(z, z.shape[-1:], eps=EPS)


def _facts(call: Call) -> Facts:
    return {"tokens": call.inputs.q.shape[2], "mini-batch": call.batch, "passes": len(call.mini_batches)}


DUAL = Implementation("dual", nothing, as_it_is, run, facts=_facts)
