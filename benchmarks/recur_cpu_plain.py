"""The recurrences as plain PyTorch loops over tokens: what is true in float64, and a contender in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def recur_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """q and k (B, H, N, D), v (B, H, N, Dv), decay (H,), (B, H, N) or (B, H, N, D), beta (B, H, N), a and b like k."""
    state = v.new_zeros(*v.shape[:2], q.shape[3], v.shape[3])
    factors = None if decay is None else _broadcast(decay, q.shape[2]).exp()
    outs = []
    for t in range(q.shape[2]):
        key, value = k[:, :, t], v[:, :, t]
        faded = state if factors is None else factors[:, :, t] * state
        if beta is not None:
            value = beta[:, :, t, None] * (value - (key.unsqueeze(-2) @ faded).squeeze(-2))
        if a is not None and b is not None:
            faded = faded + b[:, :, t].unsqueeze(-1) * (a[:, :, t].unsqueeze(-2) @ state)
        state = faded + key.unsqueeze(-1) * value.unsqueeze(-2)
        outs.append(q[:, :, t].unsqueeze(-2) @ state)
    return torch.cat(outs, 2) * q.shape[3] ** -0.5


def _broadcast(decay: Tensor, length: int) -> Tensor:
    """(B, H, N, D or 1, 1)"""
    if decay.dim() == 1:
        return decay[None, :, None, None, None].expand(-1, -1, length, -1, -1)
    return decay[..., None, None] if decay.dim() == 3 else decay.unsqueeze(-1)


def scan_loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """x, dt and z (B, N, channels), A (channels, S), B and C (B, N, S), D and dt_bias (channels,)."""
    step = softplus(dt + dt_bias)
    fade = torch.exp(step.unsqueeze(-1) * A)
    write = (step * x).unsqueeze(-1) * B.unsqueeze(2)
    state = fade.new_zeros(fade[:, 0].shape)
    outs = []
    for t in range(x.shape[1]):
        state = fade[:, t] * state + write[:, t]
        outs.append((state @ C[:, t].unsqueeze(-1)).squeeze(-1))
    return (torch.stack(outs, 1) + D * x) * silu(z)
