"""Layers of the gated delta rule: the Qwen line and OLMo-hybrid; Kimi and Bailing with a decay per channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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

_EPS = 1e-6  # below the root of a squared norm, as in all of these models


class Inputs(NamedTuple):
    """What a layer's projections say of its tokens; the convolution of ``qkv`` is still to come."""

    qkv: Tensor  # (B, N, C): queries, keys and values, heads of one after another
    gate: Tensor  # (B, N, Hv Dv)
    decay: Tensor  # (B, N, Hv) or (B, N, Hv, Dk) log-factors
    beta: Tensor  # (B, N, Hv)


Read = Callable[[Any, Tensor], Inputs]


def _forward(read: Read, out: str, norm: str) -> Callable[..., Tensor]:
    """A delta-rule layer's forward, given how to read its inputs and what it calls its last two modules."""

    @in_place_of("forward")
    def forward(
        layer: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        lengths = packed_lengths(kwargs, cache_params)
        inputs = read(layer, without_padding(hidden_states, attention_mask))
        state = last_state(layer, cache_params, hidden_states)
        qkv = convolve(layer, inputs.qkv, cache_params, lengths)
        q, k, v = _heads(qkv, dim=_key_dim(layer), value_dim=_value_dim(layer), value_heads=inputs.beta.shape[2])
        decay, beta = inputs.decay.transpose(1, 2), inputs.beta.transpose(1, 2)
        attended, state = recur(q, k, v, decay=decay, beta=beta, state=state, lengths=lengths)
        keep_state(layer, cache_params, state)
        attended = attended.transpose(1, 2)  # (B, N, Hv, Dv)
        mixed = getattr(layer, norm)(attended, inputs.gate.view(attended.shape))
        return getattr(layer, out)(mixed.flatten(2))

    return forward


def _key_dim(layer: Any) -> int:
    return getattr(layer, "head_k_dim", None) or layer.head_dim


def _value_dim(layer: Any) -> int:
    return getattr(layer, "head_v_dim", None) or layer.head_dim


def _heads(qkv: Tensor, *, dim: int, value_dim: int, value_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit queries and keys, and values: (B, Hv, N, Dk), (B, Hk, N, Dk), (B, Hv, N, Dv) of (B, N, C)."""
    values = value_heads * value_dim
    qk, v = qkv.split_with_sizes([qkv.shape[2] - values, values], dim=2)
    qk = _unit(qk.view(*qk.shape[:2], 2, -1, dim).float())
    q, k = qk.transpose(1, 3).unbind(2)  # (B, Hk, N, Dk) each
    share = value_heads // q.shape[1]
    q = q if share == 1 else q.repeat_interleave(share, dim=1)
    return q, k, v.view(*v.shape[:2], value_heads, value_dim).transpose(1, 2)


def _unit(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.rsqrt(norm * norm + _EPS)


def _fading(layer: Any, a: Tensor) -> Tensor:
    """Log-factors of a layer that has one for each value head."""
    return -layer.A_log.float().exp() * F.softplus(a.float() + layer.dt_bias)


def _qwen3_next(layer: Any, hidden: Tensor) -> Inputs:
    qkvz, ba = layer.in_proj_qkvz(hidden), layer.in_proj_ba(hidden)
    q, k, v, gate, b, a = layer.fix_query_key_value_ordering(qkvz, ba)
    qkv = torch.cat([x.flatten(2) for x in (q, k, v)], dim=2)
    return Inputs(qkv, gate.flatten(2), _fading(layer, a), b.sigmoid())


def _qwen3_5(layer: Any, hidden: Tensor) -> Inputs:
    decay, beta = _fading(layer, layer.in_proj_a(hidden)), layer.in_proj_b(hidden).sigmoid()
    return Inputs(layer.in_proj_qkv(hidden), layer.in_proj_z(hidden), decay, beta)


def _olmo_hybrid(layer: Any, hidden: Tensor) -> Inputs:
    beta = layer.b_proj(hidden).sigmoid()
    beta = 2 * beta if layer.allow_neg_eigval else beta
    return Inputs(_separate(layer, hidden), layer.g_proj(hidden), _fading(layer, layer.a_proj(hidden)), beta)


def _kimi(layer: Any, hidden: Tensor) -> Inputs:
    gate = layer.g_proj(hidden) if hasattr(layer, "g_proj") else layer.g_b_proj(layer.g_a_proj(hidden))
    return Inputs(_separate(layer, hidden), gate, layer.forget_gate(hidden), layer.b_proj(hidden).sigmoid())


def _separate(layer: Any, hidden: Tensor) -> Tensor:
    return torch.cat([layer.q_proj(hidden), layer.k_proj(hidden), layer.v_proj(hidden)], dim=2)


_qwen3_5_forward = _forward(_qwen3_5, "out_proj", "norm")
_kimi_forward = _forward(_kimi, "o_proj", "o_norm")

LAYERS = {
    "qwen3_next": {"Qwen3NextGatedDeltaNet": _forward(_qwen3_next, "out_proj", "norm")},
    "qwen3_5": {"Qwen3_5GatedDeltaNet": _qwen3_5_forward},
    "qwen3_5_moe": {"Qwen3_5MoeGatedDeltaNet": _qwen3_5_forward},
    "qwen4_exp": {"Qwen4ExpTextGatedDeltaNet": _qwen3_5_forward},
    "olmo_hybrid": {"OlmoHybridGatedDeltaNet": _forward(_olmo_hybrid, "o_proj", "o_norm")},
    "kimi_linear": {"KimiLinearDeltaAttention": _kimi_forward},
    "bailing_hybrid": {"BailingHybridDeltaAttention": _kimi_forward},
}
