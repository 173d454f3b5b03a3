"""Vision models that attend in code of their own: Swin v2, CvT and the encoder of SAM."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.adapt.hf.classes.common import attended, heads

_SHARPEST = math.log(1 / 0.01)


def swinv2(
    layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool | None = False
) -> tuple[Tensor | None, ...]:
    """Swin v2: cosines of queries and keys in a window, and biases that a small network makes of distances."""
    dim, total = layer.attention_head_size, layer.num_attention_heads
    q, k, v = (heads(project(hidden_states), dim) for project in (layer.query, layer.key, layer.value))
    q = F.normalize(q, dim=-1) * layer.logit_scale.clamp(max=_SHARPEST).exp()
    table = layer.continuous_position_bias_mlp(layer.relative_coords_table).view(-1, total)
    size = layer.window_size[0] * layer.window_size[1]
    bias = table[layer.relative_position_index.flatten()].view(1, size, size, total)
    bias = 16 * bias.permute(0, 3, 1, 2).sigmoid()  # (1, H, N, N)
    if attention_mask is not None:  # of the shifted windows (windows, N, N); the model adds it twice
        repeats = hidden_states.shape[0] // attention_mask.shape[0]
        bias = bias + 2 * attention_mask.repeat(repeats, 1, 1).unsqueeze(1)
    out, weights = attended(
        layer, q, F.normalize(k, dim=-1), v, None, bias=bias, scale=1.0, dropout=layer.dropout.p,
        weights=output_attentions,
    )  # fmt: skip
    return (out, weights) if output_attentions else (out,)


def cvt(layer: Any, hidden_state: Tensor, height: int, width: int) -> Tensor:
    """CvT: queries, keys and values by convolutions over the image, a class token beside it."""
    first = int(layer.with_cls_token)
    image = hidden_state[:, first:].transpose(1, 2).unflatten(2, (height, width))
    q, k, v = (_projected(layer, kind, image, hidden_state[:, :first]) for kind in ("query", "key", "value"))
    return attended(layer, q, k, v, None, scale=layer.scale, dropout=layer.dropout.p)[0]


def _projected(layer: Any, kind: str, image: Tensor, classes: Tensor) -> Tensor:
    tokens = getattr(layer, f"convolution_projection_{kind}")(image)
    tokens = torch.cat([classes, tokens], dim=1)
    return heads(getattr(layer, f"projection_{kind}")(tokens), layer.embed_dim // layer.num_heads)


def sam(layer: Any, hidden_states: Tensor, output_attentions: Any = None) -> tuple[Tensor, Tensor | None]:
    """SAM: biases of rows and of columns, which depend on the queries."""
    batch, height, width, _ = hidden_states.shape
    total = layer.num_attention_heads
    qkv = layer.qkv(hidden_states).view(batch, height * width, 3, total, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    bias = None
    if layer.use_rel_pos:
        sides = (height, width)
        bias = layer.get_decomposed_rel_pos(q.flatten(0, 1), layer.rel_pos_h, layer.rel_pos_w, sides, sides)
        bias = bias.reshape(batch, total, height * width, height * width)
    dropout = 0.0 if "Sdpa" in type(layer).__name__ else layer.dropout
    out, weights = attended(
        layer, q, k, v, None, bias=bias, scale=layer.scale, dropout=dropout, weights=output_attentions
    )
    return layer.proj(out.view(batch, height, width, -1)), weights


STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("swinv2", "Swinv2SelfAttention"): swinv2,
    ("cvt", "CvtSelfAttention"): cvt,
    ("sam", "SamVisionAttention"): sam,
    ("sam", "SamVisionSdpaAttention"): sam,
    ("sam_hq", "SamHQVisionAttention"): sam,
    ("sam_hq", "SamHQVisionSdpaAttention"): sam,
}
