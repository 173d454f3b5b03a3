"""Layers that are a gated short convolution and no more: the LFM2 line."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.adapt.hf.recurrent.layers import convolve, in_place_of, packed_lengths, without_padding


@in_place_of("forward")
def _short_conv(
    layer: Any, hidden_states: Tensor, past_key_values: Any = None, attention_mask: Any = None, **kwargs: Any
) -> Tensor:
    """C * conv(B * x), of three projections of a token."""
    lengths = packed_lengths(kwargs, past_key_values)
    B, C, x = layer.in_proj(without_padding(hidden_states, attention_mask)).chunk(3, dim=2)
    return layer.out_proj(C * convolve(layer, B * x, past_key_values, lengths))


LAYERS = {
    "lfm2": {"Lfm2ShortConv": _short_conv},
    "lfm2_moe": {"Lfm2MoeShortConv": _short_conv},
    "lfm3": {"Lfm3ShortConv": _short_conv},
}
