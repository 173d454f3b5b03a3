"""The recurrences as plain PyTorch loops over tokens: what is true in float64, and a contender in float32.

Tokens are taken apart by unbind, whose backward is one stack: indexing them would clear a whole tensor for each.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

Tokens = Iterable[Tensor | None]


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
    outs = []
    every = zip(_rows(q), _columns(k), _rows(v), _factors(decay), _rows(beta), _rows(a), _columns(b), strict=False)
    for query, key, value, factor, strength, reader, writer in every:
        faded = state if factor is None else factor * state
        if strength is not None:
            value = strength * (value - key.mT @ faded)
        if reader is not None:
            faded = faded + writer * (reader @ state)
        state = faded + key * value
        outs.append(query @ state)
    return torch.cat(outs, 2) * q.shape[3] ** -0.5


def _rows(x: Tensor | None) -> Tokens:
    """Each token of x (B, H, N, D) or (B, H, N) as (B, H, 1, D or 1)."""
    if x is None:
        return repeat(None)
    return (x if x.dim() == 4 else x.unsqueeze(3)).unsqueeze(3).unbind(2)


def _columns(x: Tensor | None) -> Tokens:
    """Each token of x (B, H, N, D) as (B, H, D, 1)."""
    return repeat(None) if x is None else x.unsqueeze(4).unbind(2)


def _factors(decay: Tensor | None) -> Tokens:
    """What the state is multiplied by at each token, (B, H, D or 1, 1)."""
    if decay is None:
        return repeat(None)
    if decay.dim() == 1:
        return repeat(decay.exp()[None, :, None, None])
    return _columns((decay if decay.dim() == 4 else decay.unsqueeze(3)).exp())


def scan_loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """x, dt and z (B, N, channels), A (channels, S), B and C (B, N, S), D and dt_bias (channels,)."""
    step = softplus(dt + dt_bias)
    fades = torch.exp(step.unsqueeze(-1) * A)
    writes = (step * x).unsqueeze(-1) * B.unsqueeze(2)
    state = torch.zeros_like(fades[:, 0])
    outs = []
    for fade, write, read in zip(fades.unbind(1), writes.unbind(1), C.unsqueeze(3).unbind(1), strict=True):
        state = fade * state + write
        outs.append((state @ read).squeeze(-1))
    return (torch.stack(outs, 1) + D * x) * silu(z)
