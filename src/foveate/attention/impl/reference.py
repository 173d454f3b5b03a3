"""The definition of attend: every line as in the formula, any dtype, autograd included. The oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.call import Call
from foveate.attention.gaps import by_distance
from foveate.attention.impl.spec import Spec
from foveate.attention.partial import Partial
from foveate.patterns.algebra import Scene, resolve
from foveate.patterns.select.dense import dense_mask
from foveate.plain import traced


def refuse(call: Call) -> str | None:
    """Why this implementation cannot run the call; None if it can."""
    return None


def run(call: Call) -> Partial:
    """Weights of every pair, masked and summed."""
    mask = visible(call)
    if by_distance(call.biases) and traced(*call.tensors):
        from foveate.attention.impl import ops

        call, tokens = ops.positioned(call)
        mask = mask & tokens
    return weigh(call.q, call.k, call.v, mask, call)


def weigh(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, how: Call | Spec) -> Partial:
    """Attend over the visible pairs (B or 1, H, N, M); what is not finite spoils the rows that see it, no others."""
    k, v = grouped(k, q.shape[1]), grouped(v, q.shape[1])
    odd_q, odd_k, odd_v = (~x.isfinite().all(-1, keepdim=True) for x in (q, k, v))
    q, k, v = q.masked_fill(odd_q, 0), k.masked_fill(odd_k, 0), v.masked_fill(odd_v, 0)
    logits = how.scale * (q @ k.mT)  # (B, H, N, M)
    if how.softcap is not None:
        logits = how.softcap * torch.tanh(logits / how.softcap)
    for bias in how.biases:
        logits = logits + bias.values(*_indices(logits)).to(logits.dtype)
    for function in how.functions:
        logits = function(logits, *_indices(logits))
    logits = logits.masked_fill(odd_q | (odd_k | odd_v).mT, float("nan"))
    if how.kind == "softmax":
        return _softmax(logits, visible, v, how)
    if how.normalise is not None:
        weights = how.normalise(logits, visible)
    else:
        weights = torch.sigmoid(logits) if how.kind == "sigmoid" else torch.relu(logits)
    return Partial(_dropped(torch.where(visible, weights, 0), how) @ v, None)


def grouped(heads_first: Tensor, heads: int) -> Tensor:
    """Keys or values (B, G, M, D) as seen by each query head, (B, H, M, D)."""
    return heads_first.repeat_interleave(heads // heads_first.shape[1], dim=1)


def _softmax(logits: Tensor, visible: Tensor, v: Tensor, how: Call | Spec) -> Partial:
    logits = torch.where(visible, logits, float("-inf"))
    empty = logits.isneginf().all(-1, keepdim=True)
    logits = torch.where(empty, 0, logits)
    lse = torch.where(empty, float("-inf"), torch.logsumexp(logits, -1, keepdim=True))
    weights = torch.where(visible & ~empty, torch.softmax(logits, -1), 0)
    return Partial(_dropped(weights, how) @ v, lse.squeeze(-1))


def _dropped(weights: Tensor, how: Call | Spec) -> Tensor:
    return weights if how.dropout is None else weights * how.dropout.factor(*_indices(weights), weights.dtype)


def visible(call: Call) -> Tensor:
    """The dense mask of a call's pattern for each of its heads, (B or 1, H, N, M)."""
    mask = pattern_mask(call)
    return mask.repeat_interleave(call.heads // mask.shape[1], dim=1)


def pattern_mask(call: Call) -> Tensor:
    """The dense mask of a call's pattern, (B or 1, heads that it tells apart, N, M)."""
    if traced(*call.tensors) and _goes_by_operator(call):
        from foveate.attention.impl import ops  # which knows every implementation

        return ops.visible(call)
    scene = Scene(call.num_queries, call.num_keys, call.layout, call.q.detach(), call.k.detach(), call.scale)
    return dense_mask(resolve(call.pattern, scene), scene, call.q.device)


def _goes_by_operator(call: Call) -> bool:
    """Whether a mask is found by an operator, which may look at numbers that are traced; its pattern goes as text."""
    from foveate.attention.impl import ops

    return torch.compiler.is_compiling() or call.pattern.is_dynamic or ops.travels(call)


def _indices(pairs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch entry, query head, query and key of each pair, broadcasting to (B, H, N, M)."""
    batch, head, q, k = (
        torch.arange(n, device=pairs.device).view([-1 if axis == dim else 1 for axis in range(4)])
        for dim, n in enumerate(pairs.shape)
    )
    return batch, head, q, k
