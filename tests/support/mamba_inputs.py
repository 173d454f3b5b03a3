"""Calls of mamba_ssm's functions on random tensors, and the loops that say what they should give."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

Drawn = dict[str, Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def assert_same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def heads(batch: int = 2, length: int = 13, groups: int = 2, d_per_channel: bool = False) -> Drawn:
    """Four heads of 5 channels, states of 3."""
    vectors = batch, length, groups, 3
    return {
        "x": normal(batch, length, 4, 5),
        "dt": normal(batch, length, 4),
        "A": -torch.rand(4, dtype=torch.float64),
        "B": normal(*vectors),
        "C": normal(*vectors),
        "D": normal(4, 5) if d_per_channel else normal(4),
        "z": normal(batch, length, 4, 5),
        "dt_bias": normal(4),
    }


def plain_heads(drawn: Drawn, states: Tensor, starts: set[tuple[int, int]] = frozenset()) -> tuple[Tensor, Tensor]:
    """One token and head after another; the state is zero again at ``starts`` (row, token)."""
    x, dt, A, B, C, D, z, bias = (drawn[name] for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias"))
    share, out, states = x.shape[2] // B.shape[2], torch.empty_like(x), states.clone()
    last = [[torch.empty(0)] * x.shape[2] for _ in x]
    for b in range(x.shape[0]):
        for h in range(x.shape[2]):
            state = states[b, h]
            for t in range(x.shape[1]):
                state = torch.zeros_like(state) if (b, t) in starts else state
                step = softplus(dt[b, t, h] + bias[h])
                state = (step * A[h]).exp() * state + step * x[b, t, h].outer(B[b, t, h // share])
                out[b, t, h] = state @ C[b, t, h // share] + D[h] * x[b, t, h]
            last[b][h] = state
    return out * silu(z), torch.stack([torch.stack(row) for row in last])


def channels(vectors: str = "plain", batch: int = 2, length: int = 13) -> Drawn:
    """Six channels, states of 3; B and C shared by all, by groups of channels, or constant."""
    shape = {"plain": (batch, 3, length), "groups": (batch, 2, 3, length), "constant": (6, 3)}[vectors]
    return {
        "u": normal(batch, 6, length),
        "delta": normal(batch, 6, length),
        "A": -torch.rand(6, 3, dtype=torch.float64),
        "B": normal(*shape),
        "C": normal(*shape),
        "D": normal(6),
        "z": normal(batch, 6, length),
        "delta_bias": normal(6),
    }


def plain_channels(drawn: Drawn) -> tuple[Tensor, Tensor]:
    u, delta, A, B, C, D, z, bias = drawn.values()
    batch, width, length = u.shape

    def at(x: Tensor, b: int, c: int, t: int) -> Tensor:
        if x.shape == A.shape:
            return x[c]
        return x[b, :, t] if x.dim() == 3 else x[b, c // (width // x.shape[1]), :, t]

    out, last = torch.empty_like(u), []
    for b in range(batch):
        for c in range(width):
            state = torch.zeros(3, dtype=u.dtype)
            for t in range(length):
                step = softplus(delta[b, c, t] + bias[c])
                state = (step * A[c]).exp() * state + step * u[b, c, t] * at(B, b, c, t)
                out[b, c, t] = at(C, b, c, t) @ state + D[c] * u[b, c, t]
            last.append(state)
    return out * silu(z), torch.stack(last).unflatten(0, (batch, width))
