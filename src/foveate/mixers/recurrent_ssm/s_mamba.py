"""S-Mamba: two Mamba blocks over variates, forwards and backwards."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from foveate.catalogue.registry import register
from foveate.layouts.orders import (
    bidirectional,
)
from foveate.mixers.base import Mixer
from foveate.mixers.recurrent_ssm.mamba import Mamba, StateOptions
from foveate.mixers.stateful import laid_end_to_end
from foveate.patterns import Layout
from foveate.patterns import Sequence as Line


@register(
    "s_mamba",
    papers=("S-Mamba",),
    formula="out = mamba(x) + reverse(mamba'(reverse(x))), a token for each variate",
    supports={"noncausal", "padding", "packed"},
)
class SMamba(Mixer):
    """Two whole Mamba blocks, one over the tokens and one over them reversed; a token is a variate's whole series."""

    def __init__(
        self, dim: int, *, expand: int = 1, conv: int = 2, causal: bool = False, **sizes: Unpack[StateOptions]
    ) -> None:
        super().__init__(dim, causal=causal)
        self.forwards, self.backwards = (Mamba(dim, expand=expand, conv=conv, **sizes) for _ in range(2))

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        flat, key_mask, lengths = laid_end_to_end(x, padding, layout)
        out = flat.new_zeros(())
        for mamba, order in zip((self.forwards, self.backwards), bidirectional(Line(flat.shape[1])), strict=True):
            ahead = lengths if lengths is None or order.is_identity else lengths[::-1]
            seen = None if key_mask is None else order.apply(key_mask)
            out = out + order.undo(mamba.run(order.apply(flat), None, ahead, seen).out)
        return out.reshape(x.shape)
