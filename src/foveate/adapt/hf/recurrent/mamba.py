"""Layers of selective state spaces: Mamba, Falcon-Mamba, Jamba and Zamba."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.adapt.hf.recurrent.layers import (
    convolve,
    in_place_of,
    keep_state,
    last_state,
    packed_lengths,
    without_padding,
)
from foveate.recurrence import scan


@in_place_of("forward")
def _mamba(
    layer: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
) -> Tensor:
    """Mamba; Falcon-Mamba and Jamba, which normalise dt, B and C, are told by their norms."""
    lengths = packed_lengths(kwargs, cache_params)
    x, gate = layer.in_proj(without_padding(hidden_states, attention_mask)).chunk(2, dim=2)
    state = last_state(layer, cache_params, hidden_states)
    x = without_padding(convolve(layer, x, cache_params, lengths), attention_mask)
    size = layer.ssm_state_size
    dt, B, C = layer.x_proj(x).split_with_sizes([layer.time_step_rank, size, size], dim=2)
    if hasattr(layer, "dt_layernorm"):
        dt, B, C = layer.dt_layernorm(dt), layer.b_layernorm(B), layer.c_layernorm(C)
    A = -layer.A_log.float().exp()
    out, state = scan(x, layer.dt_proj(dt), A, B, C, D=layer.D, z=gate, softplus=True, state=state, lengths=lengths)
    keep_state(layer, cache_params, state)
    return layer.out_proj(out)


@in_place_of("forward")
def _zamba(
    layer: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
) -> Tensor:
    """Zamba: heads with dt, B and C of their own."""
    lengths = packed_lengths(kwargs, cache_params)
    projected = layer.in_proj(without_padding(hidden_states, attention_mask))
    x, gate = projected.unflatten(2, (-1, 2)).unbind(3)
    state = last_state(layer, cache_params, hidden_states)  # (B, heads, C / heads, S)
    x = without_padding(convolve(layer, x.contiguous(), cache_params, lengths), attention_mask)
    dt, B, C = _of_heads(layer, x)
    heads = layer.n_mamba_heads
    out, state = scan(
        x,
        dt,
        -layer.A_log.float().exp().flatten(0, 1),
        B,
        C,
        D=layer.D.flatten(),
        z=gate,
        dt_bias=layer.dt_proj_bias.flatten(),
        softplus=True,
        state=None if state is None else state.flatten(1, 2),
        lengths=lengths,
    )
    keep_state(layer, cache_params, state.unflatten(1, (heads, -1)))
    return layer.out_proj(out)


def _of_heads(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dt (B, N, C), B and C (B, N, heads, S) of x (B, N, C)."""
    size = layer.ssm_state_size
    apart = x.unflatten(2, (layer.n_mamba_heads, -1))
    read = torch.einsum("bnhc,hrc->bnhr", apart, layer.x_proj_weight)
    dt, B, C = read.split_with_sizes([layer.time_step_rank, size, size], dim=3)
    dt = torch.einsum("bnhr,hcr->bnhc", dt, layer.dt_proj_weight)
    return dt.flatten(2), B, C


LAYERS = {
    "mamba": {"MambaMixer": _mamba},
    "falcon_mamba": {"FalconMambaMixer": _mamba},
    "jamba": {"JambaMambaMixer": _mamba},
    "zamba": {"ZambaMambaMixer": _zamba},
}
