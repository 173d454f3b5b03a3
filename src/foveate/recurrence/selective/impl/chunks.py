"""Scans and convolutions in torch's own operators: all tokens of a chunk at once, on any device."""

from __future__ import annotations

from torch import Tensor

from foveate.dispatch import Facts, Implementation, as_it_is, nothing
from foveate.recurrence.selective.chunked import CHUNK, FORMS
from foveate.recurrence.selective.inputs import Call, one_by_one, state_facts

SHORT = 2  # tokens up to which the loop over tokens is faster


def defer(call: Call) -> str | None:
    """Why the loop over tokens is the better form; None where it is not."""
    length = call.inputs.x.shape[1]
    return f"a loop over {length} tokens is faster" if length <= SHORT else None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Out (B, N, C) and the state after the last token, or one for each packed sequence."""
    return one_by_one(FORMS, *call)


def _facts(call: Call) -> Facts:
    chunk = CHUNK.get(type(call.inputs))
    return ({} if chunk is None else {"chunk": chunk}) | state_facts(call)


CHUNKS = Implementation("chunks", nothing, as_it_is, run, defer, _facts)
