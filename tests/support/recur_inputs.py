"""Random inputs for the tests of `recur`, and an implementation that shares nothing with the library's."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate import recurrence as operators
from foveate.recurrence import Recurrent

DECAYS = ("none", "head", "token", "channel")
UPDATES = ("additive", "delta", "low rank", "bonus", "low rank, bonus")

Inputs = dict[str, Any]


def recur(**arguments: Any) -> Recurrent:
    """The operator, whose low_rank = (a, b) lies in `Inputs` as two tensors."""
    return operators.recur(**_paired(**arguments))


def step(**arguments: Any) -> Recurrent:
    return operators.step(**_paired(**arguments))


def _paired(a: Tensor | None = None, b: Tensor | None = None, **arguments: Any) -> Inputs:
    return arguments if a is None else {**arguments, "low_rank": (a, b)}


def fresh_generator() -> torch.Generator:
    """Numbers of its own, whatever torch has drawn before in this test."""
    return torch.Generator().manual_seed(random.randrange(2**32))


def make_inputs(
    decay: str = "none",
    update: str = "additive",
    *,
    batch: int = 2,
    heads: tuple[int, int, int, int] = (2, 2, 2, 2),
    length: int = 65,
    dims: tuple[int, int] = (7, 5),
    strength: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Keyword arguments of one `recur` call: keys of unit length, decays in [-strength, 0], a full state.

    heads are those of q, of k, of v, and of the gates: decay, beta, low_rank.
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
    if update == "delta":
        inputs["beta"] = 2 * uniform(*gate_shape)
    if "low rank" in update:
        inputs["a"] = -normalize(normal(*gate_shape, dim), dim=-1)
        inputs["b"] = -inputs["a"] * uniform(*gate_shape, dim)  # as in RWKV-7: the state is turned, and does not grow
    if "bonus" in update:
        inputs["bonus"] = normal(num_q, dim) if "low rank" in update else normal(batch, num_q, length, dim)
    gated = decay != "none" or update not in ("additive", "bonus")
    num_states = math.lcm(num_k, num_v, num_gates if gated else 1)
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    state_dtype = dtype if dtype == torch.float64 else torch.float32
    return {**inputs, "state": normal(batch, num_states, dim, dim_v).to(state_dtype)}


def has_time(name: str, x: Tensor) -> bool:
    return name != "state" and x.dim() > (2 if name == "bonus" else 1)


def cut(inputs: Inputs, start: int, stop: int) -> Inputs:
    """The same call on tokens start to stop."""
    return {name: x[:, :, start:stop] if has_time(name, x) else x for name, x in inputs.items()}


def spread(inputs: Inputs) -> Inputs:
    """The same call with what all tokens share, a decay per head or RWKV-7's bonus, given to each of them."""
    batch, _, length, _ = inputs["q"].shape
    return {
        name: x[None, :, None].repeat(batch, 1, length, *(1,) * (x.dim() - 1))
        if (name, x.dim()) in (("decay", 1), ("bonus", 2))
        else x
        for name, x in inputs.items()
    }


def summed(grad: Tensor, apart: Tensor) -> Tensor:
    """What is added up in a gradient, without the signs: what is left of sums that cancel is no measure of errors."""
    return grad if apart.shape == grad.shape else apart.abs().sum((0, 2))


def plain_recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    bonus: Tensor | None = None,
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
        key, value, before = k[:, :, t, :, None], v[:, :, t, None, :], state
        state = torch.diag_embed(factors[:, :, t]) @ state
        if beta is not None:
            strength = _one_per_query_head(beta, num_heads)[:, :, t, None, None]
            state = (identity - strength * key @ key.mT) @ state
            value = strength * value
        if a is not None and b is not None:
            a_t, b_t = (_one_per_query_head(x, num_heads)[:, :, t, :, None] for x in (a, b))
            state = state + b_t @ a_t.mT @ before
        state = state + key @ value
        read = state
        if bonus is not None:
            own = bonus[None, :, None] if bonus.dim() == 2 else bonus[:, :, t, None]
            read = before + (own.mT * key) @ value
        outs.append(dim**-0.5 * q[:, :, t, None, :] @ read)
    return torch.cat(outs, 2), state


def _one_per_query_head(x: Tensor, num_heads: int) -> Tensor:
    return x.repeat_interleave(num_heads // x.shape[1], 1)
