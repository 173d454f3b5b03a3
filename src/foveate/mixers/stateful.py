"""Causal mixers whose decoding state is a few tensors of fixed size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.catalogue.registry import Feature
from foveate.mixers.base import Mixer, StepOutput
from foveate.patterns import Layout, Packed

Lengths = Sequence[int] | None


class StatefulMixer(Mixer):
    """A mixer that says how tokens change a state: ``run``; forward, decoding and packing follow from it."""

    usual_supports: ClassVar[frozenset[Feature]] = frozenset({"causal", "padding", "packed", "decode"})

    def run(self, x: Tensor, state: Any, lengths: Lengths, key_mask: Tensor | None) -> StepOutput:
        """Mix tokens x (B, N, C) after what ``state`` holds, a named tuple of tensors.

        Where it is None they are the first. ``lengths`` are those of packed
        sequences, then x has batch size 1 and starts afresh at each; tokens outside ``key_mask`` (B, N)
        must neither write nor decay.
        """
        raise NotImplementedError

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        flat, key_mask, lengths = laid_end_to_end(x, padding, layout)
        return self.run(flat, None, lengths, key_mask).out.reshape(x.shape)

    def mix_after(self, x: Tensor, state: Any) -> StepOutput:
        return self.run(x, state, None, None)

    @torch.no_grad()
    def empty_state(self, batch: int, capacity: int | None) -> Any:
        return self.run(self.weight.new_zeros(batch, 0, self.dim), None, None, None).state  # what no tokens leave


def laid_end_to_end(
    x: Tensor, padding: Tensor | None, layout: Layout | None
) -> tuple[Tensor, Tensor | None, list[int] | None]:
    """Tokens and padding as one pack with its lengths, if the layout is packed; otherwise as they are."""
    if not isinstance(layout, Packed) or x.shape[0] * x.shape[1] == 0:
        return x, padding, None
    key_mask = None if padding is None else padding.reshape(1, -1)
    return x.flatten(0, 1).unsqueeze(0), key_mask, list(layout.lengths) * x.shape[0]
