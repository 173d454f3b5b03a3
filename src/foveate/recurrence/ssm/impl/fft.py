"""Convolution with the impulse response, by transforms over twice the length, so that nothing wraps round."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.dispatch import Facts, Implementation, as_it_is, nothing
from foveate.recurrence.ssm.inputs import Call, by_chunk, short
from foveate.recurrence.ssm.response import fft_conv, kernel, powers, remembered


def defer(call: Call) -> str | None:
    """Why the loop over tokens is the better form; None where it is not."""
    return short(*call.x.shape[:2])


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    """Out (B, N, C) and the state after the last token."""
    return by_chunk(_by_transform, call)


def _by_transform(
    x: Tensor, transition: Tensor, write: Tensor, read: Tensor, state: Tensor | None, final: bool
) -> tuple[Tensor, Tensor | None]:
    length = x.shape[1]
    if not length:
        return x, transition.new_zeros(x.shape[0], *transition.shape) if state is None else state
    y = fft_conv(x, kernel(transition, read * write, length))
    if state is not None:
        ages = torch.arange(1, length + 1, device=x.device)
        fading = powers(transition, ages)  # (C, S, N)
        y = y + 2 * torch.einsum("bcs,csn->bnc", state * read, fading).real
    if not final:
        return y, None
    left = write * remembered(x, transition)
    return y, left if state is None else left + powers(transition, length) * state


def _facts(call: Call) -> Facts:
    length = call.x.shape[1]
    return {"tokens": length, "transform": 2 * min(length, call.chunk or length)}


FFT = Implementation("fft", nothing, as_it_is, run, defer, _facts)
