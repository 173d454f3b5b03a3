"""The definition: what is stored is made floats, and attended to segment by segment."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.api import attend_partial
from foveate.attention.partial import Partial, merge
from foveate.attention.stored.call import StoredCall
from foveate.attention.stored.segment import Segment
from foveate.patterns.algebra import Pattern
from foveate.patterns.rules.masks import boolean_mask
from foveate.patterns.rules.sequence import full


def attend_dequantised(call: StoredCall) -> Partial:
    """Attention to each segment, merged."""
    hides = call.causal and call.q.shape[2] > 1
    behind: list[Tensor | None] = [*call.behind()] if hides else [None] * len(call.stored)
    return merge([_attend(call, one, after) for one, after in zip(call.stored, behind, strict=True)])


def _attend(call: StoredCall, one: Segment, behind: Tensor | None) -> Partial:
    q = call.q
    _check_pages(one)
    k, v = one.gathered(q.dtype)
    pattern = _visible(q, one, behind)
    return attend_partial(q, k, v, pattern, bias=one.bias, scale=call.scale, softcap=call.softcap)


def _visible(q: Tensor, one: Segment, behind: Tensor | None) -> Pattern:
    """The slots that each query sees."""
    if one.lengths is None and behind is None:
        return full
    last = one.counts.unsqueeze(2)  # (B, G, N or 1): the first slot that a query does not see
    if behind is not None:
        later = torch.arange(q.shape[2] - 1, -1, -1, device=q.device)
        last = last - (later - behind.unsqueeze(2)).clamp_min(0)
    seen = torch.arange(one.slots, device=q.device) < last.unsqueeze(3)
    seen = seen.expand(-1, -1, q.shape[2], -1)
    return boolean_mask(seen.repeat_interleave(q.shape[1] // one.heads, dim=1))


def _check_pages(one: Segment) -> None:
    """Refuse numbers of pages that there are not, among those that hold tokens."""
    if one.pages is None:
        return
    first = torch.arange(one.pages.shape[2], device=one.pages.device) * one.k.shape[2]
    used = first < one.counts.unsqueeze(2)
    wrong = used & ((one.pages < 0) | (one.pages >= one.k.shape[0]))
    if bool(wrong.any()) or bool((one.counts > one.slots).any()) or bool((one.counts < 0).any()):
        raise ValueError(f"lengths are up to {one.slots}, and pages are numbered from 0 to {one.k.shape[0] - 1}")
