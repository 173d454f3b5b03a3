"""The definition of attend as an implementation: the mask of every pair, and the formula. The oracle."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.attention.call import Call
from foveate.attention.gaps import by_distance
from foveate.attention.impl import ops
from foveate.attention.impl.definition import weigh
from foveate.attention.partial import Partial
from foveate.dispatch import Facts, Implementation, nothing
from foveate.patterns.algebra import Scene, resolve
from foveate.patterns.select.dense import dense_mask
from foveate.plain import traced


class Planned(NamedTuple):
    """A call, and which pairs are visible to each of its heads."""

    call: Call
    mask: Tensor  # (B or 1, H, N, M)


def plan(call: Call) -> Planned:
    """The pattern as a dense mask."""
    mask = pattern_mask(call)
    mask = mask.repeat_interleave(call.heads // mask.shape[1], dim=1)
    if by_distance(call.biases) and traced(*call.tensors):
        call, tokens = ops.positioned(call)
        mask = mask & tokens
    return Planned(call, mask)


def run(planned: Planned) -> Partial:
    """Weights of every pair, masked and summed."""
    call, mask = planned
    return weigh(call.q, call.k, call.v, mask, call)


def pattern_mask(call: Call) -> Tensor:
    """The dense mask of a call's pattern, (B or 1, heads that it tells apart, N, M)."""
    if traced(*call.tensors) and _goes_by_operator(call):
        return ops.visible(call)
    scene = Scene(call.num_queries, call.num_keys, call.layout, call.q.detach(), call.k.detach(), call.scale)
    return dense_mask(resolve(call.pattern, scene), scene, call.q.device)


def _goes_by_operator(call: Call) -> bool:
    """Whether a mask is found by an operator, which may look at numbers that are traced; its pattern goes as text."""
    return torch.compiler.is_compiling() or call.pattern.is_dynamic or ops.travels(call)


def _facts(planned: Planned) -> Facts:
    call = planned.call
    return {"pairs": call.batch * call.heads * call.num_queries * call.num_keys}


REFERENCE = Implementation("reference", nothing, plan, run, facts=_facts)
