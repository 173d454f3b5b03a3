"""Random calls of `attend`, and an implementation that shares nothing with the library's."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

from foveate import alibi, relative_table, relu, sigmoid, softmax

LENGTHS = ((1, 1), (1, 65), (5, 130), (64, 64), (65, 65), (111, 111), (130, 70))
HEADS = ((4, 2, 4), (4, 1, 2), (3, 3, 3), (6, 2, 3), (4, 4, 1))  # query, key and value heads
DIMS = ((8, 8), (7, 9), (1, 3), (16, 5))
BIASES = ("none", "dense", "broadcast", "alibi", "relative")
WEIGHTS = ("softmax", "sink", "sigmoid", "relu")


def random_call(num_queries: int, num_keys: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Keyword arguments of one `attend` call; every tensor in it requires a gradient."""
    heads, key_heads, value_heads = random.choice(HEADS)
    dim, value_dim = random.choice(DIMS)
    call: dict[str, Any] = {
        "q": leaf(2, num_queries, heads, dim, dtype=dtype).transpose(1, 2),  # as a model's projections arrive
        "k": leaf(2, key_heads, num_keys, dim, dtype=dtype),
        "v": leaf(2, value_heads, num_keys, value_dim, dtype=dtype),
        "bias": random_bias(heads, num_queries, num_keys, dtype),
        "weights": random_weights(heads, dtype),
        "scale": random.choice([None, 0.3]),
        "softcap": random.choice([None, None, 1.5]),
    }
    return call


def random_bias(heads: int, num_queries: int, num_keys: int, dtype: torch.dtype) -> Any:
    kind = random.choice(BIASES)
    if kind == "dense":
        return leaf(2, heads, num_queries, num_keys, dtype=dtype)
    if kind == "broadcast":
        return leaf(num_queries, num_keys, dtype=dtype)
    if kind == "alibi":
        return alibi(leaf(heads, dtype=dtype))
    return relative_table(leaf(heads, 2 * random.randint(0, 9) + 1, dtype=dtype)) if kind == "relative" else None


def random_weights(heads: int, dtype: torch.dtype) -> Any:
    kind, per_head = random.choice(WEIGHTS), random.choice([1, heads])
    if kind == "sink":
        return softmax(sink=leaf(per_head, dtype=dtype))
    if kind == "sigmoid":
        return sigmoid(bias=leaf(per_head, dtype=dtype))
    return relu(bias=leaf(per_head, dtype=dtype)) if kind == "relu" else "softmax"


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def leaves(call: dict[str, Any]) -> list[Tensor]:
    """The tensors of a call that gradients are taken of."""
    tensors = [call["q"], call["k"], call["v"]]
    bias, weights = call["bias"], call["weights"]
    if bias is not None:
        tensors.append(bias if isinstance(bias, Tensor) else bias.parameter)
    tensors += [t for t in (getattr(weights, "sink", None), getattr(weights, "bias", None)) if t is not None]
    return tensors


def by_loops(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention (B, H, N, Dv), one row at a time, in plain Python; visible is (N, M)."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            kh, vh = h * k.shape[1] // q.shape[1], h * v.shape[1] // q.shape[1]
            for i in range(q.shape[2]):
                seen = [j for j in range(k.shape[2]) if visible[i, j]]
                weights = [math.exp(float(q[b, h, i] @ k[b, kh, j]) / math.sqrt(q.shape[3])) for j in seen]
                for weight, j in zip(weights, seen, strict=True):
                    out[b, h, i] += weight / sum(weights) * v[b, vh, j]
    return out
