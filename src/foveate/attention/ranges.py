"""attend over ranges of keys: what a decoding step reads, at the cost of a dense call over as many keys.

A selection in tiles serves 64 queries at a time; one query that reads a few stretches of a long cache would pay for 64.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.attention.api import ATTEND, attend
from foveate.attention.call import Call, prepare
from foveate.attention.cost import bytes_read, empty_heads
from foveate.attention.impl import key_ranges as kernel
from foveate.attention.key_ranges import KeyRanges, RangesCall, Scored
from foveate.attention.weights import Weights
from foveate.counting import Cost, counted
from foveate.dispatch import Facts, Implementation, Operator
from foveate.patterns.algebra import Pattern
from foveate.patterns.rules.masks import boolean_mask
from foveate.patterns.rules.sequence import full
from foveate.precision import to_accum


def ranges_cost(q: Tensor, k: Tensor, v: Tensor, seen: KeyRanges, **_: Any) -> Cost:
    """Operations of attend_ranges: a product of D and one of Dv channels for each visible pair."""
    pairs = q.shape[0] * q.shape[1] // (seen.batches * seen.heads) * q.shape[2] * seen.total
    return Cost(2 * (q.shape[3] + v.shape[3]) * pairs, pairs, pairs, bytes_read(q, k, v, pairs))


@counted("attend", ranges_cost, empty_heads)
def attend_ranges(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: KeyRanges,
    *,
    bias: Tensor | None = None,
    weights: Weights | str = "softmax",
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of a few queries to key slots in ranges, the same for all queries of a head; (B, H, N, Dv).

    >>> import torch
    >>> from foveate.attention.key_ranges import KeyRanges
    >>> q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 900, 8), torch.randn(1, 2, 900, 8)
    >>> attend_ranges(q, k, v, KeyRanges.of([((0, 4), (600, 900))])).shape
    torch.Size([1, 4, 1, 8])

    Shapes and dtypes are those of ``attend``; ``bias``, (B or 1, H or 1, 1, M), is added to the logits of each key.
    ``impl`` is the name of an implementation (``ATTEND_RANGES.names``): the kernel, or one of attend's under a mask.
    """
    call = RangesCall(q, k, v, _checked(seen, q), bias, weights, scale)
    if ATTEND_RANGES.takes("native", impl):
        out = kernel.short(call)
        if out is not None:
            return out.out
    return ATTEND_RANGES(call, impl).out


def scored_cost(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Cost:
    return ranges_cost(q, k, v, KeyRanges.of([((0, k.shape[2]),)]))


def empty_scored(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Scored:
    return Scored(empty_heads(q, k, v), to_accum(q.new_empty(*q.shape[:3], k.shape[2])))


@counted("attend", scored_cost, empty_scored)
def attend_scored(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, impl: str = "auto") -> Scored:
    """Softmax attention of a few queries to all keys, and the logits of their weights, read off in the same pass.

    >>> import torch
    >>> q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 90, 8), torch.randn(1, 2, 90, 8)
    >>> out, logits = attend_scored(q, k, v)
    >>> out.shape, logits.shape
    (torch.Size([1, 4, 1, 8]), torch.Size([1, 4, 1, 90]))

    Logits (B, H, N, M) are in at least float32. What chooses by the weights of some keys need not read them twice.
    """
    call = RangesCall(q, k, v, KeyRanges.of([((0, k.shape[2]),)]), None, "softmax", scale, logits=True)
    if ATTEND_RANGES.takes("native", impl):
        out = kernel.short(call)
        if out is not None:
            return out
    return ATTEND_RANGES(call, impl)


def _checked(seen: KeyRanges, q: Tensor) -> KeyRanges:
    if seen.batches not in (1, q.shape[0]) or q.shape[1] % seen.heads:
        have = f"{seen.batches} entries and {seen.heads} heads"
        raise ValueError(f"ranges of {have}, but q has {q.shape[0]} and {q.shape[1]}")
    return seen


# ---- attend's implementations, under a mask ------------------------------------------------------------------------


def masked(name: str) -> Implementation[RangesCall, RangesCall, Scored]:
    """An implementation of attend, over ranges as a mask of keys."""

    def refuse(call: RangesCall) -> str | None:
        return ATTEND.refusal(name, _prepared(call))

    def run(call: RangesCall) -> Scored:
        q, k, v, _, bias, weights, scale, wants_logits = call
        out = attend(q, k, v, _pattern(call), bias=bias, weights=weights, scale=scale, impl=name)
        return Scored(out, _logits(call) if wants_logits else None)

    return Implementation(name, refuse, plan=lambda call: call, run=run)


def _prepared(call: RangesCall) -> Call:
    q, k, v, _, bias, weights, scale, _ = call
    return prepare(q, k, v, _pattern(call), bias, weights, scale, None, None, needs_lse=False)[0]


def _pattern(call: RangesCall) -> Pattern:
    if call.seen.single == (0, call.k.shape[2]):
        return full
    heads, mask = call.q.shape[1], call.seen.mask(call.k.shape[2], call.k.device)
    mask = mask.repeat_interleave(heads // mask.shape[1], dim=1) if mask.shape[1] > 1 else mask
    return boolean_mask(mask.expand(-1, -1, call.q.shape[2], -1))


def _logits(call: RangesCall) -> Tensor:
    q, k = to_accum(call.q), to_accum(call.k)
    groups = q.unflatten(1, (k.shape[1], -1))  # (B, G, H / G, N, D)
    return (groups * call.factor @ k.mT.unsqueeze(2)).flatten(1, 2)


def _described(call: RangesCall) -> Facts:
    return {"keys": call.seen.total, "of": call.k.shape[2]}


ATTEND_RANGES: Operator[RangesCall, Scored] = Operator(
    "attend_ranges", [kernel.NATIVE, *(masked(name) for name in ATTEND.names if name != "native")], describe=_described
)
