"""Layers of structured state spaces with one decay a head: Mamba-2 and the models built on it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.adapt.hf.recurrent.layers import (
    convolve,
    in_place_of,
    keep_state,
    last_state,
    packed_lengths,
    without_padding,
)
from foveate.recurrence import recur


@in_place_of("forward")
def _mamba2(
    layer: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
) -> Tensor:
    projected = layer.in_proj(without_padding(hidden_states, attention_mask))
    out, gate = _mix(layer, projected, cache_params, attention_mask, kwargs)
    return layer.out_proj(layer.norm(out, gate).to(hidden_states.dtype))


@in_place_of("forward")
def _falcon_h1(
    layer: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
) -> Tensor:
    hidden = without_padding(hidden_states, attention_mask) * layer.ssm_in_multiplier
    out, gate = _mix(layer, layer.in_proj(hidden) * layer.mup_vector, cache_params, attention_mask, kwargs)
    out = layer.norm(out, gate) if layer.mamba_rms_norm else out * F.silu(gate)
    return layer.out_proj(out.to(hidden_states.dtype))


def _mix(
    layer: Any, projected: Tensor, cache: Any, mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """What comes between the two projections: (B, N, H P), and the gate that is still to be applied."""
    lengths = packed_lengths(kwargs, cache)
    inner, groups, size = layer.intermediate_size, layer.n_groups, layer.ssm_state_size
    gate, xBC, dt = projected.split_with_sizes([inner, layer.conv_dim, layer.num_heads], dim=2)
    state = last_state(layer, cache, projected)  # (B, H, P, S)
    xBC = without_padding(convolve(layer, xBC, cache, lengths), mask)
    x, B, C = xBC.split_with_sizes([inner, groups * size, groups * size], dim=2)
    x = x.view(*x.shape[:2], layer.num_heads, layer.head_dim)
    B, C = (each.view(*x.shape[:2], groups, size).transpose(1, 2) for each in (B, C))
    dt = F.softplus(dt + layer.dt_bias)
    if state is None or x.shape[1] > 1:  # the models themselves bound no dt of a single decoded token
        dt = dt.clamp(*layer.time_step_limit)
    dt = dt.float()
    out, state = recur(
        _each_head(C, layer.num_heads),
        B,
        (x * dt.unsqueeze(3)).transpose(1, 2),
        decay=(dt * -layer.A_log.float().exp()).transpose(1, 2),
        scale=1.0,
        state=None if state is None else state.transpose(2, 3),
        lengths=lengths,
    )
    keep_state(layer, cache, state.transpose(2, 3))
    return torch.addcmul(out.transpose(1, 2), x, layer.D[:, None]).flatten(2), gate


def _each_head(x: Tensor, heads: int) -> Tensor:
    """(B, H, N, S) of (B, groups, N, S)."""
    groups = x.shape[1]
    return x.expand(-1, heads, -1, -1) if groups == 1 else x.repeat_interleave(heads // groups, dim=1)


LAYERS = {
    "mamba2": {"Mamba2Mixer": _mamba2},
    "bamba": {"BambaMixer": _mamba2},
    "granitemoehybrid": {"GraniteMoeHybridMambaLayer": _mamba2},
    "falcon_h1": {"FalconH1Mixer": _falcon_h1},
    "zamba2": {"Zamba2MambaMixer": _mamba2},
    "nemotron_h": {"NemotronHMamba2Mixer": _mamba2},
}
