"""Random inputs for the tests of `recur`, and an implementation that shares nothing with the library's."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

DECAYS = ("none", "head", "token", "channel")

Inputs = dict[str, Any]


def fresh_generator() -> torch.Generator:
    """Seeded anew on each run; pytest shows the seed when a test fails."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def make_inputs(
    decay: str = "none",
    delta: bool = False,
    *,
    batch: int = 2,
    heads: tuple[int, int, int, int] = (2, 2, 2, 2),
    length: int = 65,
    dims: tuple[int, int] = (7, 5),
    strength: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Keyword arguments of one `recur` call: keys of unit length, decays in [-strength, 0], a full state.

    heads are those of q, of k, of v, and of decay and beta.
    """
    generator = fresh_generator()
    num_q, num_k, num_v, num_gates = heads
    dim, dim_v = dims

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "q": normal(batch, num_q, length, dim),
        "k": normalize(normal(batch, num_k, length, dim), dim=-1),
        "v": normal(batch, num_v, length, dim_v),
    }
    gate_shape = (batch, num_gates, length)
    decay_shapes = {"head": (num_gates,), "token": gate_shape, "channel": (*gate_shape, dim)}
    if decay != "none":
        inputs["decay"] = -strength * uniform(*decay_shapes[decay])
    if delta:
        inputs["beta"] = 2 * uniform(*gate_shape)
    num_states = math.lcm(num_k, num_v, num_gates if decay != "none" or delta else 1)
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    state_dtype = dtype if dtype == torch.float64 else torch.float32
    return {**inputs, "state": normal(batch, num_states, dim, dim_v).to(state_dtype)}


def has_time(name: str, x: Tensor) -> bool:
    return name != "state" and x.dim() > 1


def cut(inputs: Inputs, start: int, stop: int) -> Inputs:
    """The same call on tokens start to stop."""
    return {name: x[:, :, start:stop] if has_time(name, x) else x for name, x in inputs.items()}


def plain_recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One state per query head and one matrix per token, all in the dtype of q."""
    num_heads, dim = q.shape[1], q.shape[3]
    k, v, state = (_one_per_query_head(x, num_heads) for x in (k, v, state.to(q.dtype)))
    decay = q.new_zeros(num_heads) if decay is None else decay
    decay = decay[None, :, None] if decay.dim() == 1 else decay
    decay = decay[..., None] if decay.dim() == 3 else decay
    factors = _one_per_query_head(decay.exp(), num_heads).expand(len(q), -1, q.shape[2], dim)
    identity = torch.eye(dim, dtype=q.dtype)
    outs = []
    for t in range(q.shape[2]):
        key, value = k[:, :, t, :, None], v[:, :, t, None, :]
        state = torch.diag_embed(factors[:, :, t]) @ state
        if beta is not None:
            strength = _one_per_query_head(beta, num_heads)[:, :, t, None, None]
            state = (identity - strength * key @ key.mT) @ state
            value = strength * value
        state = state + key @ value
        outs.append(dim**-0.5 * q[:, :, t, None, :] @ state)
    return torch.cat(outs, 2), state


def _one_per_query_head(x: Tensor, num_heads: int) -> Tensor:
    return x.repeat_interleave(num_heads // x.shape[1], 1)
