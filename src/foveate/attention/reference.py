"""The definition of attend: every line as in the formula, any dtype, autograd included. The oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.bias import Bias
from foveate.attention.call import Call
from foveate.attention.partial import Partial
from foveate.patterns.algebra import Scene, resolve
from foveate.patterns.dense import dense_mask


def refuse(call: Call) -> str | None:
    """Why this implementation cannot run the call; None if it can."""
    return None


def run(call: Call) -> Partial:
    """Weights of every pair, masked and summed."""
    logits = call.scale * (call.q @ grouped(call.k, call.heads).transpose(-2, -1))  # (B, H, N, M)
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    for bias in call.biases:
        logits = logits + _everywhere(bias, call).to(logits.dtype)
    visible = _visible(call)
    v = grouped(call.v, call.heads)
    if call.kind == "softmax":
        return _softmax(logits, visible, v, call)
    weights = torch.sigmoid(logits) if call.kind == "sigmoid" else torch.relu(logits)
    return Partial(_dropped(torch.where(visible, weights, 0), call) @ v, None)


def grouped(heads_first: Tensor, heads: int) -> Tensor:
    """Keys or values (B, G, M, D) as seen by each query head, (B, H, M, D)."""
    return heads_first.repeat_interleave(heads // heads_first.shape[1], dim=1)


def _softmax(logits: Tensor, visible: Tensor, v: Tensor, call: Call) -> Partial:
    logits = torch.where(visible, logits, float("-inf"))
    empty = logits.isneginf().all(-1, keepdim=True)
    logits = torch.where(empty, 0, logits)
    lse = torch.where(empty, float("-inf"), torch.logsumexp(logits, -1, keepdim=True))
    weights = torch.where(empty, 0, torch.softmax(logits, -1))
    return Partial(_dropped(weights, call) @ v, lse.squeeze(-1))


def _dropped(weights: Tensor, call: Call) -> Tensor:
    return weights if call.dropout is None else weights * call.dropout.factor(*_indices(call), weights.dtype)


def _visible(call: Call) -> Tensor:
    scene = Scene(call.num_queries, call.num_keys, call.layout, call.q.detach(), call.k.detach(), call.scale)
    visible = dense_mask(resolve(call.pattern, scene), scene, call.q.device)
    return visible.repeat_interleave(call.heads // visible.shape[1], dim=1)


def _everywhere(bias: Bias, call: Call) -> Tensor:
    return bias.values(*_indices(call))


def _indices(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch entry, query head, query and key of each pair, broadcasting to (B, H, N, M)."""
    batch, head, q, k = (
        torch.arange(n, device=call.q.device).view([-1 if axis == dim else 1 for axis in range(4)])
        for dim, n in enumerate((call.batch, call.heads, call.num_queries, call.num_keys))
    )
    return batch, head, q, k
