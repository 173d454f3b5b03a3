"""Queries, keys and values in heads, and exact attention over them written out."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def heads(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def qkv(n: int, m: int | None = None, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Two sequences, four query heads, two key and value heads."""
    m = n if m is None else m
    return heads(2, 4, n, dim), heads(2, 2, m, dim), heads(2, 2, m, dim)


def split(x: Tensor, count: int) -> Tensor:
    """(B, N, C) to (B, count, N, C / count)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, bias: Tensor | float = 0.0) -> Tensor:
    """Softmax attention over the pairs in ``seen``; nothing where a row sees no key."""
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    logits = q @ k.mT / math.sqrt(q.shape[-1]) + bias
    if seen is None:
        return torch.softmax(logits, -1) @ v
    return torch.softmax(logits.masked_fill(~seen, -1e300), -1) * seen @ v


def agree(got: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    """Equal values, and equal gradients by the inputs."""
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    upstream = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(x, inputs, upstream, allow_unused=True) for x in (got, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-9)


def turned(x: Tensor, places: Tensor, base: float) -> Tensor:
    """Rotary positions: channels c and c + D / 2 are a complex number, turned by the place."""
    half = x.shape[-1] // 2
    angles = places.double().unsqueeze(-1) * base ** (-torch.arange(half, dtype=torch.float64) / half)
    number = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([number.real, number.imag], -1)


def stepped(model: nn.Module, x: Tensor) -> Tensor:
    """What a mixer answers, decoding token by token."""
    state, outs = model.init_state(x.shape[0]), []
    for token in x.split(1, dim=1):
        out, state = model.decode(token, state)
        outs.append(out)
    return torch.cat(outs, dim=1)
