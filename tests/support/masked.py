"""Dense attention under a mask, written out: what a test holds sparse attention to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None) -> Tensor:
    """Softmax over the keys that ``seen`` (broadcast to (B, H, N, M)) shows; zeros for a query that sees none.

    q (B, H, N, D), k and v (B, G, M, D): query heads share keys in order.
    """
    k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
    logits = (q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)).masked_fill(~seen, float("-inf"))
    numbers = torch.finfo(logits.dtype)
    weights = torch.exp(logits - logits.amax(-1, keepdim=True).detach().clamp_min(numbers.min))
    return weights @ v / weights.sum(-1, keepdim=True).clamp_min(numbers.tiny)


def masked_mixer(mixer: Any, x: Tensor, seen: Tensor) -> Tensor:
    """The same between the projections of a mixer, x (B, N, C)."""
    q, k, v = (
        (x @ layer.weight.T).unflatten(-1, (heads, -1)).transpose(1, 2)
        for layer, heads in ((mixer.to_q, mixer.heads), (mixer.to_k, mixer.kv_heads), (mixer.to_v, mixer.kv_heads))
    )
    return masked(q, k, v, seen).transpose(1, 2).flatten(2) @ mixer.to_out.weight.T
