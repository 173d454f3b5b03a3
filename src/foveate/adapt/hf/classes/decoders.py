"""Decoders that attend in code of their own: Bloom, MPT, Falcon, CodeGen and GPT-J."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.adapt.hf.classes.common import attended, heads, of_its_file


def bloom(
    layer: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Any,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Bloom: ALiBi as a row of biases (B * H, 1, M), and the residual inside the layer."""
    q, k, v = layer._reshape(layer.query_key_value(hidden_states))
    if layer_past is not None:
        k, v = layer_past.update(k, v, layer.layer_idx)
    bias = layer.beta * alibi.unflatten(0, (-1, layer.num_heads))
    out, weights = attended(
        layer, q, k, v, attention_mask, bias=bias, scale=layer.inv_norm_factor, dropout=layer.attention_dropout.p,
        causal=True, weights=output_attentions,
    )  # fmt: skip
    sliced = layer.pretraining_tp > 1 and layer.slow_but_exact  # the model then leaves the bias out
    out = F.linear(out, layer.dense.weight) if sliced else layer.dense(out)
    return residual + F.dropout(out, layer.hidden_dropout, layer.training), weights


def mpt(
    layer: Any,
    hidden_states: Tensor,
    position_bias: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Any = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """MPT: ALiBi (H, 1, longest), counted from the last key."""
    mixed = layer.Wqkv(hidden_states)
    if layer.clip_qkv:
        mixed = mixed.clamp(-layer.clip_qkv, layer.clip_qkv)
    q, k, v = (heads(x, layer.head_dim) for x in mixed.chunk(3, dim=2))
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, layer.layer_idx)
    total = k.shape[2] if attention_mask is None else attention_mask.shape[-1]
    bias = None if position_bias is None else position_bias[None, :, :, -total:].to(q.dtype)
    out, weights = attended(
        layer, q, k, v, attention_mask, bias=bias, scale=layer.softmax_scale, dropout=layer.attn_dropout_p,
        causal=True, weights=output_attentions,
    )  # fmt: skip
    return layer.out_proj(out), weights


def falcon(
    layer: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Any,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Falcon: rotary, or with ALiBi, which its model then has put into the mask."""
    q, k, v = (x.transpose(1, 2) for x in layer._split_heads(layer.query_key_value(hidden_states)))
    if alibi is None:
        q, k = of_its_file(layer, "apply_rotary_pos_emb")(q, k, *(position_embeddings or ()))
    if layer_past is not None:
        k, v = layer_past.update(k, v, layer.layer_idx)
    dropout = 0.0 if alibi is None else layer.attention_dropout.p
    out, weights = attended(
        layer, q, k, v, attention_mask, scale=layer.inv_norm_factor, dropout=dropout, causal=True,
        weights=output_attentions,
    )  # fmt: skip
    return layer.dense(out), weights


_PARTS = 4  # CodeGen's projection lies as it did on as many processors


def codegen(
    layer: Any,
    hidden_states: Tensor,
    layer_past: Any = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    use_cache: bool | None = False,
    output_attentions: bool | None = False,
) -> tuple[Tensor, Tensor | None]:
    """CodeGen: rotary over some of the channels."""
    parts = layer.qkv_proj(hidden_states).unflatten(-1, (_PARTS, 3, -1))  # (B, N, 4, 3, C / 4)
    q, v, k = (heads(x.flatten(2), layer.head_dim) for x in parts.unbind(3))
    return _rotary(layer, q, k, v, layer_past, attention_mask, position_ids, output_attentions)


def gptj(
    layer: Any,
    hidden_states: Tensor,
    layer_past: Any = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    use_cache: bool | None = False,
    output_attentions: bool | None = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """GPT-J: rotary over some of the channels."""
    q, k, v = (heads(project(hidden_states), layer.head_dim) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
    return _rotary(layer, q, k, v, layer_past, attention_mask, position_ids, output_attentions)


def _rotary(
    layer: Any, q: Tensor, k: Tensor, v: Tensor, cache: Any, mask: Any, position_ids: Any, weights: bool | None
) -> tuple[Tensor, Tensor | None]:
    sin, cos = layer.embed_positions.to(q.device)[position_ids].chunk(2, dim=-1)
    q, k = (_turned(layer, x, sin, cos).to(v.dtype) for x in (q, k))
    if cache is not None:
        k, v = cache.update(k, v, layer.layer_idx)
    dropout = layer.attn_dropout.p
    out, formed = attended(
        layer, q, k, v, mask, scale=1 / float(layer.scale_attn), dropout=dropout, causal=True, weights=weights
    )
    return layer.resid_dropout(layer.out_proj(out)), formed


def _turned(layer: Any, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    size, x = layer.rotary_dim or x.shape[-1], x.transpose(1, 2)
    turned = of_its_file(layer, "apply_rotary_pos_emb")(x[..., :size], sin, cos)
    return torch.cat([turned, x[..., size:]], dim=-1).transpose(1, 2)


STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("bloom", "BloomAttention"): bloom,
    ("mpt", "MptAttention"): mpt,
    ("falcon", "FalconAttention"): falcon,
    ("codegen", "CodeGenAttention"): codegen,
    ("gptj", "GPTJAttention"): gptj,
}
