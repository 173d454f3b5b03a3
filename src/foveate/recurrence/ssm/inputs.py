"""Calls of the time-invariant state spaces as their implementations see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SHORT = 8  # tokens up to which the loop over tokens is faster than what looks at all of them at once


class Call(NamedTuple):
    """A state space in each channel, as `evolve` has it."""

    x: Tensor  # (B, N, C), in the arithmetic's dtype
    transition: Tensor  # (C, S), complex, as are write and read
    write: Tensor
    read: Tensor
    state: Tensor | None  # (B, C, S)
    final: bool  # whether the state after the last token is wanted
    chunk: int | None


class SharedCall(NamedTuple):
    """States that all channels share, as `evolve_shared` has them."""

    u: Tensor  # (B, N, S), complex
    transition: Tensor  # (S,)
    state: Tensor  # (B, S)


Form = Callable[..., tuple[Tensor, Tensor | None]]  # of the fields of a call, but for the chunk


def by_chunk(form: Form, call: Call) -> tuple[Tensor, Tensor | None]:
    """Out (B, N, C) and the last state, chunk after chunk."""
    outs, state = [], call.state
    pieces = call.x.split(call.chunk or max(1, call.x.shape[1]), dim=1)
    for number, piece in enumerate(pieces, 1):
        last = number == len(pieces)
        out, state = form(piece, call.transition, call.write, call.read, state, call.final or not last)
        outs.append(out)
    return torch.cat(outs, dim=1), state if call.final else None


def short(batch: int, length: int) -> str | None:
    """Why a loop over tokens is the better form; None where it is not."""
    if batch == 0 or length <= SHORT:  # transforms of nothing are refused
        return f"a loop over {length if batch else 0} tokens is faster"
    return None
