"""Causal mixers whose decoding state is a few tensors of fixed size, and the parts that state-space blocks share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.mixers.base import Mixer, StepOutput
from foveate.patterns import Layout, Packed

Lengths = Sequence[int] | None


class StatefulMixer(Mixer):
    """A mixer that says how tokens change a state: ``run``; forward, decoding and packing follow from it."""

    def run(self, x: Tensor, state: Any, lengths: Lengths, key_mask: Tensor | None) -> StepOutput:
        """Mix tokens x (B, N, C) after what ``state`` holds, a named tuple of tensors.

        Where it is None they are the first, and no state need be returned. ``lengths`` are those of packed
        sequences, then x has batch size 1 and starts afresh at each; tokens that are not ``real`` (B, N) must
        neither write nor fade.
        """
        raise NotImplementedError

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        if padding is not None:
            x = x.masked_fill(~padding.unsqueeze(-1), 0)  # a convolution would read on
        flat, key_mask, lengths = laid_end_to_end(x, padding, layout)
        return self.run(flat, None, lengths, key_mask).out.reshape(x.shape)

    def mix_after(self, x: Tensor, state: Any) -> StepOutput:
        return self.run(x, state, None, None)

    def state_bytes(self, n: int) -> int:
        return sum(tensor.nbytes for tensor in tensors_of(self.empty_state(1, None)) if tensor.dtype != torch.long)


def tensors_of(state: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples."""
    if isinstance(state, Tensor):
        yield state
    else:
        for part in state:
            yield from tensors_of(part)


def laid_end_to_end(
    x: Tensor, padding: Tensor | None, layout: Layout | None
) -> tuple[Tensor, Tensor | None, list[int] | None]:
    """Tokens and padding as one pack with its lengths, if the layout is packed; otherwise as they are."""
    if not isinstance(layout, Packed) or x.shape[0] * x.shape[1] == 0:
        return x, padding, None
    key_mask = None if padding is None else padding.reshape(1, -1)
    return x.flatten(0, 1).unsqueeze(0), key_mask, list(layout.lengths) * x.shape[0]


def step_bias(count: int) -> nn.Parameter:
    """Biases whose softplus, the step size, is log-uniform in [0.001, 0.1], as in Mamba."""
    step = torch.empty(count).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    return nn.Parameter(step.expm1().log())
