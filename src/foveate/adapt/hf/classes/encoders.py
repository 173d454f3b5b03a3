"""Encoders that attend in code of their own: MPNet, DeBERTa, and BigBird with full attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.adapt.hf.classes.common import attended, heads, of_tokens


def mpnet(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor | None, ...]:
    """MPNet: relative position biases that its model computes."""
    q, k, v = (heads(project(hidden_states), layer.attention_head_size) for project in (layer.q, layer.k, layer.v))
    out, weights = attended(
        layer, q, k, v, attention_mask, bias=position_bias, dropout=layer.dropout.p, weights=output_attentions
    )
    return (layer.o(out), weights) if output_attentions else (layer.o(out),)


def deberta(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Any,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """DeBERTa: disentangled attention, whose terms of content and position are a bias here."""
    if query_states is not None:
        raise ValueError("DeBERTa with queries of their own (query_states) is not supported")
    dim = layer.attention_head_size
    q, k, v = heads(layer.in_proj(hidden_states), 3 * dim).chunk(3, dim=-1)
    terms = 1 + len(layer.pos_att_type)
    q = (q + heads(layer.q_bias[None, None], dim)) / (dim * terms) ** 0.5
    v = v + heads(layer.v_bias[None, None], dim)
    bias = None
    if layer.relative_attention and rel_embeddings is not None and relative_pos is not None:
        bias = layer.disentangled_att_bias(q, k, relative_pos, layer.pos_dropout(rel_embeddings), terms)
    return _disentangled(layer, q, k, v, attention_mask, bias, 1.0, output_attentions)


def deberta_v2(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Any,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """DeBERTa-v2 and -v3: as before, with heads folded into the batch where the bias is computed."""
    asked = hidden_states if query_states is None else query_states
    pairs = ((layer.query_proj, asked), (layer.key_proj, hidden_states), (layer.value_proj, hidden_states))
    q, k, v = (heads(project(x), layer.attention_head_size) for project, x in pairs)
    terms = 1 + len({"c2p", "p2c"} & set(layer.pos_att_type))
    bias = None
    if layer.relative_attention:
        rel_embeddings, flat = layer.pos_dropout(rel_embeddings), (q.flatten(0, 1), k.flatten(0, 1))
        bias = layer.disentangled_attention_bias(*flat, relative_pos, rel_embeddings, terms)
        bias = bias.unflatten(0, q.shape[:2]) if isinstance(bias, Tensor) else None
    scale = (layer.attention_head_size * terms) ** -0.5
    return _disentangled(layer, q, k, v, attention_mask, bias, scale, output_attentions)


def _disentangled(
    layer: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, bias: Any, scale: float, weights: bool
) -> tuple[Tensor, Tensor | None]:
    bias = bias if isinstance(bias, Tensor) else None
    return attended(layer, q, k, v, of_tokens(mask), bias=bias, scale=scale, dropout=layer.dropout.p, weights=weights)


def big_bird(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """BigBird with attention_type="original_full", as an encoder or a decoder."""
    crossing, cache, dim = encoder_hidden_states is not None, past_key_values, layer.attention_head_size
    q = heads(layer.query(hidden_states), dim)
    mask = encoder_attention_mask if crossing else attention_mask
    if crossing and cache is not None and cache.get_seq_length(layer.layer_idx) > 0:
        k, v = cache.layers[layer.layer_idx].keys, cache.layers[layer.layer_idx].values
    else:
        source = encoder_hidden_states if crossing else hidden_states
        k, v = heads(layer.key(source), dim), heads(layer.value(source), dim)
        if cache is not None:
            k, v = cache.update(k, v, layer.layer_idx)
    if isinstance(mask, Tensor) and mask.is_floating_point() and not layer.is_decoder:
        mask = of_tokens(mask >= torch.finfo(mask.dtype).min / 2)
    return attended(layer, q, k, v, mask, dropout=layer.dropout.p, weights=kwargs.get("output_attentions"))


STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("mpnet", "MPNetSelfAttention"): mpnet,
    ("deberta", "DisentangledSelfAttention"): deberta,
    ("deberta_v2", "DisentangledSelfAttention"): deberta_v2,
    ("big_bird", "BigBirdSelfAttention"): big_bird,
}
