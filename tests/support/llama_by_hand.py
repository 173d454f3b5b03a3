"""Llama written out: what a method makes of it is told by a function of a layer's queries, keys and values alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Heads = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""q (H, N, D), k (H, N, D), v (H, N, D) without positions, and the layer's number, to heads out (H, N, D)."""


def turned(x: Tensor, at: Tensor, base: float = 10_000.0) -> Tensor:
    """x (..., D) at positions (...): pairs of channels c and c + D / 2 turned by position * base ** (-2 c / D)."""
    half = x.shape[-1] // 2
    angle = at.double().unsqueeze(-1) * base ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def logits(model: Any, tokens: Tensor, heads_out: Heads) -> Tensor:
    """Logits (N, V) of one text (N,), in float64."""
    w = {name: value.double() for name, value in model.state_dict().items()}
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    eps = model.config.rms_norm_eps

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[name]

    def split(x: Tensor, count: int) -> Tensor:
        return x.view(len(tokens), count, -1).transpose(0, 1).repeat_interleave(heads // count, 0)

    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(model.config.num_hidden_layers):
        at = f"model.layers.{layer}."
        y = norm(x, at + "input_layernorm.weight")
        q, k, v = (y @ w[f"{at}self_attn.{name}_proj.weight"].T for name in "qkv")
        out = heads_out(split(q, heads), split(k, groups), split(v, groups), layer)
        x = x + out.transpose(0, 1).reshape(len(tokens), -1) @ w[at + "self_attn.o_proj.weight"].T
        y = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (y @ w[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


def exact(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    """Causal attention as the model has it."""
    at = torch.arange(q.shape[1])
    scores = turned(q, at) @ turned(k, at).mT * q.shape[-1] ** -0.5
    return scores.masked_fill(at[:, None] < at, float("-inf")).softmax(-1) @ v
