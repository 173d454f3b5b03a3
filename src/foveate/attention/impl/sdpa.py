"""attend by torch's scaled_dot_product_attention: dense and causal calls, and small masked ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveate.attention.bias import Dense
from foveate.attention.biases import total
from foveate.attention.call import Call
from foveate.attention.impl import ops
from foveate.attention.partial import Partial
from foveate.dispatch import Facts, Implementation
from foveate.patterns.algebra import Scene, resolve
from foveate.patterns.rules.sequence import causal, full
from foveate.patterns.select.dense import dense_mask
from foveate.plain import differentiated, is_plain, traced

SMALL = 2**20  # pairs per head below which a dense mask was measured cheaper than gathering tiles


def refuse(call: Call) -> str | None:
    """Why this implementation cannot run the call; None if it can."""
    if call.dropout is not None:
        return "its dropout would drop other weights than the seed says"
    if differentiated():
        return "derivatives in forward mode and by torch.func are those of the reference"
    if call.kind != "softmax":
        return f"it has softmax weights only, not {call.kind}"
    if call.needs_lse:
        return "it does not return the log row sums that a sink or a partial result needs"
    if call.q.numel() == 0 or call.num_keys == 0:
        return "it does not take empty inputs"
    if call.functions:
        return "it has no score functions"
    if call.softcap is not None:
        return "it has no soft-cap"
    if call.k.shape[1] != call.v.shape[1]:
        return "it wants as many key heads as value heads"
    if any(not isinstance(bias, Dense) for bias in call.biases):
        return "it has dense biases only"
    if call.q.dtype == torch.float64 and call.q.is_cpu and _wants_gradient(call):
        return "its gradient in float64 could not be differentiated again"
    if is_plain(call.q, call.k, call.v) and not _is_finite(call):
        return "what is not finite would reach rows that do not see it, and leave rows that do at zero"
    if _needs_mask(call) and call.num_queries * call.num_keys >= SMALL:
        return f"{call.pattern} would cost it a dense {call.num_queries} x {call.num_keys} mask"
    return None


def _wants_gradient(call: Call) -> bool:
    tensors = (call.q, call.k, call.v, *(bias.parameter for bias in call.biases))
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class Planned(NamedTuple):
    """What SDPA is given."""

    call: Call
    q: Tensor  # the query heads of a group as further queries, where keys are then read once
    mask: Tensor | None  # (B or 1, H or 1, N, M): added to the logits, or what is visible
    is_causal: bool


def plan(call: Call) -> Planned:
    """The mask or bias written out where there is one, and queries that share keys side by side."""
    mask = _mask(call)
    is_causal = mask is None and call.pattern == causal and call.num_queries > 1
    fold = call.heads // call.k.shape[1]
    if fold == 1 or is_causal or (mask is not None and mask.shape[1] > 1):
        return Planned(call, call.q, mask, is_causal)
    q = call.q.reshape(call.batch, call.k.shape[1], fold * call.num_queries, call.q.shape[3])
    return Planned(call, q, mask if mask is None else mask.repeat(1, 1, fold, 1), is_causal)


def run(planned: Planned) -> Partial:
    """One fused call."""
    call, q, mask, is_causal = planned
    out = scaled_dot_product_attention(
        q,
        call.k,
        call.v,
        attn_mask=mask,
        is_causal=is_causal,
        scale=call.scale,
        enable_gqa=q.shape[1] > call.k.shape[1],
    )
    return Partial(out.reshape(call.batch, call.heads, call.num_queries, call.v.shape[3]), None)


def _facts(planned: Planned) -> Facts:
    mask = planned.mask
    if mask is None:
        return {"mask": "causal" if planned.is_causal else "none"}
    return {"mask": "x".join(map(str, mask.shape)), "mask_bytes": mask.numel() * mask.element_size()}


def _needs_mask(call: Call) -> bool:
    if call.layout.packed_lengths is not None:
        return True
    if call.pattern == causal:
        return not (call.num_queries == call.num_keys and not call.biases) and call.num_queries != 1
    return call.pattern != full


def _is_finite(call: Call) -> bool:
    return all(bool(x.isfinite().all()) for x in (call.q, call.k, call.v))


def _mask(call: Call) -> Tensor | None:
    """What SDPA adds to the logits (B or 1, H or 1, N, M), or None."""
    visible = _visible(call) if _needs_mask(call) else None
    if not call.biases:
        return visible
    bias = total(call.biases).to(call.q.dtype)
    shape = (bias.shape[0], bias.shape[1], call.num_queries, call.num_keys)
    return bias.expand(shape) if visible is None else torch.where(visible, bias, float("-inf"))


def _visible(call: Call) -> Tensor:
    if torch.compiler.is_compiling() or (call.pattern.is_dynamic and traced(call.q, call.k)):
        visible = ops.visible(call)
    else:
        scene = Scene(call.num_queries, call.num_keys, call.layout, call.q.detach(), call.k.detach(), call.scale)
        visible = dense_mask(resolve(call.pattern, scene), scene, call.q.device)
    if visible.shape[1] in (1, call.heads):
        return visible
    return visible.repeat_interleave(call.heads // visible.shape[1], dim=1)


SDPA = Implementation("sdpa", refuse, plan, run, facts=_facts)
