"""attend by torch's FlexAttention, on GPUs: the selection becomes a BlockMask, biases and functions its score_mod."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.attention.call import Call
from foveate.attention.gaps import by_distance
from foveate.attention.partial import Partial
from foveate.dispatch import Facts, Implementation
from foveate.plain import differentiated, traced


def refuse(call: Call) -> str | None:
    """Why this implementation cannot run the call; None if it can."""
    if call.dropout is not None:
        return "it has no dropout on weights"
    if differentiated():
        return "derivatives in forward mode and by torch.func are those of the reference"
    if call.q.device.type == "cpu":
        return "FlexAttention has no backward on CPU, and compiles for seconds"
    if call.kind != "softmax":
        return f"it has softmax weights only, not {call.kind}"
    if call.q.dtype == torch.float64:
        return "it has no float64"
    if call.k.shape[1] != call.v.shape[1]:
        return "it wants as many key heads as value heads"
    if by_distance(call.biases) and call.pattern.tensors and traced(*call.tensors):
        return "padding between tokens, which biases by distance must not count, is seen by other operators only"
    if call.pattern.is_dynamic or call.pattern.heads not in (1, call.heads):
        return "dynamic and group-wise patterns are left to tiles"
    return None


class Planned(NamedTuple):
    """What FlexAttention is given."""

    call: Call
    mask: Any  # a BlockMask


def plan(call: Call) -> Planned:
    """The selection as a BlockMask."""
    from foveate.patterns import documents
    from foveate.patterns.select.flex import to_block_mask

    pattern = call.pattern
    if call.layout.packed_lengths is not None:
        pattern = pattern & documents(call.layout.packed_lengths)
    return Planned(
        call, to_block_mask(pattern, call.num_queries, call.num_keys, layout=call.layout, device=call.q.device)
    )


def run(planned: Planned) -> Partial:
    """One FlexAttention call with the selection's blocks."""
    return attend_flex(planned, _compiled())


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def attend_flex(planned: Planned, flex_attention: Any) -> Partial:
    """Attend with a given (compiled or eager) FlexAttention."""
    from torch.nn.attention.flex_attention import AuxRequest

    call = planned.call
    out, aux = flex_attention(
        call.q,
        call.k,
        call.v,
        score_mod=score_mod(call) if call.softcap is not None or call.biases or call.functions else None,
        block_mask=planned.mask,
        scale=call.scale,
        enable_gqa=call.k.shape[1] != call.heads,
        return_aux=AuxRequest(lse=True),
    )
    return Partial(out, aux.lse)


def score_mod(call: Call) -> Any:
    """What FlexAttention makes of each logit of a call."""

    def score(logit: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if call.softcap is not None:
            logit = call.softcap * torch.tanh(logit / call.softcap)
        for bias in call.biases:
            logit = logit + bias.values(batch, head, q, k).to(logit.dtype)
        for function in call.functions:
            logit = function.fn(logit, batch, head, q, k, *function.tensors).to(logit.dtype)  # one number, no shape
        return logit

    return score


def _facts(planned: Planned) -> Facts:
    return {"blocks": "x".join(map(str, planned.mask.BLOCK_SIZE)), "empty": f"{planned.mask.sparsity():.1f}%"}


FLEX = Implementation("flex", refuse, plan, run, facts=_facts)
