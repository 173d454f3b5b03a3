"""The formula of attend, pair by pair, in torch's own operators: any dtype, autograd included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from foveate.attention.call import Call
from foveate.attention.impl.neighborhood import Windows
from foveate.attention.impl.plan import ByDocument, Plan, Selected
from foveate.attention.partial import Partial, sums_dtype
from foveate.layouts.kinds import Grid
from foveate.patterns.band import Band
from foveate.patterns.rules.grid import neighborhood
from foveate.precision import to_accum


def weigh(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, how: Call | Plan) -> Partial:
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


def _softmax(logits: Tensor, visible: Tensor, v: Tensor, how: Call | Plan) -> Partial:
    logits = torch.where(visible, logits, float("-inf"))
    empty = logits.isneginf().all(-1, keepdim=True)
    logits = torch.where(empty, 0, logits)
    lse = torch.where(empty, float("-inf"), torch.logsumexp(logits, -1, keepdim=True))
    weights = torch.where(visible & ~empty, torch.softmax(logits, -1), 0)
    return Partial(_dropped(weights, how) @ v, lse.squeeze(-1))


def _dropped(weights: Tensor, how: Call | Plan) -> Tensor:
    return weights if how.dropout is None else weights * how.dropout.factor(*_indices(weights), weights.dtype)


def _indices(pairs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch entry, query head, query and key of each pair, broadcasting to (B, H, N, M)."""
    batch, head, q, k = (
        torch.arange(n, device=pairs.device).view([-1 if axis == dim else 1 for axis in range(4)])
        for dim, n in enumerate(pairs.shape)
    )
    return batch, head, q, k


def definition(plan: Plan, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """What kernels return for q, k, v and the parameters of biases, by every pair."""
    plan = with_parameters(plan, inputs[3:])
    q, k, v = (to_accum(x) for x in inputs[:3] if x is not None)
    out, lse = weigh(q, k, v, visible(plan.selected, q, k), plan)
    lse = q.new_zeros(q.shape[:3]) if lse is None else lse
    return out.to(inputs[0].dtype), lse.to(sums_dtype(q))  # type: ignore[union-attr]


def with_parameters(plan: Plan, parameters: Sequence[Tensor | None]) -> Plan:
    """The plan with parameters that autograd has kept for it, and has seen to be unchanged."""
    pairs = zip(plan.biases, parameters, strict=True)
    return plan._replace(biases=tuple(replace(bias, parameter=p) for bias, p in pairs if p is not None))


def visible(selected: Selected, q: Tensor, k: Tensor) -> Tensor:
    """The dense mask (B or 1, H, N, M) of what was selected."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    if isinstance(selected, ByDocument):
        return _visible_by_document(selected, q, k)
    if isinstance(selected, Band):
        place = torch.arange(num_queries, device=q.device) + num_keys - num_queries
        distance = place.unsqueeze(1) - torch.arange(num_keys, device=q.device)
        return ((selected.low <= distance) & (distance <= selected.high)).expand(1, q.shape[1], -1, -1)
    if isinstance(selected, Windows):
        pattern = neighborhood(selected.size, dilation=selected.dilation, causal=selected.causal)
        mask = pattern.mask(num_queries, layout=Grid(*selected.dims)).to(q.device)
    else:
        mask = selected.to_dense().clone()  # a selection may have been kept since inference mode
    return mask.repeat_interleave(q.shape[1] // mask.shape[1], dim=1)


def _visible_by_document(selected: ByDocument, q: Tensor, k: Tensor) -> Tensor:
    mask = torch.zeros((*q.shape[:3], k.shape[2]), dtype=torch.bool, device=q.device)
    for piece in selected.pieces:
        own = visible(piece.selected, piece.part(q, piece.queries), piece.part(k, piece.keys))
        queries = torch.arange(q.shape[2], device=q.device)[piece.queries]
        keys = torch.arange(k.shape[2], device=q.device)[piece.keys]
        mask[piece.batch, :, queries[:, None], keys] = own
    return mask
