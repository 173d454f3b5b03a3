"""recur in torch's own operators, parallel inside chunks: on any device, differentiable as often as one likes."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from foveate.dispatch import Facts, Implementation, nothing
from foveate.recurrence.linear.checks import check_ranges_of
from foveate.recurrence.linear.chunked.form import recur_by_chunk
from foveate.recurrence.linear.inputs import Call, one_by_one, state_facts

SHORT = 2  # tokens up to which the loop over tokens is the faster form in torch


def defer(call: Call) -> str | None:
    """Why the loop over tokens is the better form; None where it is not."""
    length = call.tokens.q.size(2)
    return f"a loop over {length} tokens is faster" if call.causal and length <= SHORT else None


def plan(call: Call) -> Call:
    """Everything is as the call says, once its gates are known to be in range."""
    check_ranges_of(call.tokens)
    return call


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Out (B, H, N, Dv) and the state (B, S, D, Dv) after the last token."""
    form = partial(recur_by_chunk, causal=call.causal, chunk=call.chunk)
    return one_by_one(form, call.tokens, call.state, call.lengths)


def _facts(call: Call) -> Facts:
    return {"chunk": call.chunk, "tokens": call.tokens.k.size(2), **state_facts(call)}


CHUNKS = Implementation("chunks", nothing, plan, run, defer, _facts)
