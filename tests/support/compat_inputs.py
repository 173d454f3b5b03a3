"""Calls of foveate.compat.fla on random tensors, and the loop that says what they should give."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from foveate.compat import fla

Drawn = dict[str, Tensor]

# function: (its arguments, each a drawn tensor, by the same name unless another follows), what of them means what
CASES: dict[str, tuple[str, str]] = {
    "chunk_gla": ("q k v g:gk", "g:gk"),
    "fused_chunk_gla": ("q k v g:gk", "g:gk"),
    "fused_recurrent_gla": ("q k v gk", "g:gk"),
    "chunk_simple_gla": ("q k v g", "g"),
    "fused_chunk_simple_gla": ("q k v g_gamma", "g:g_gamma"),
    "fused_recurrent_simple_gla": ("q k v g", "g"),
    "parallel_simple_gla": ("q k v g", "g"),
    "chunk_retention": ("q k v", "g:retention"),
    "fused_chunk_retention": ("q k v", "g:retention"),
    "fused_recurrent_retention": ("q k v", "g:retention"),
    "parallel_retention": ("q k v", "g:retention"),
    "chunk_lightning_attn": ("q k v", "g:lightning"),
    "fused_recurrent_lightning_attn": ("q k v", "g:lightning"),
    "chunk_linear_attn": ("q k v", ""),
    "fused_chunk_linear_attn": ("q k v", ""),
    "fused_recurrent_linear_attn": ("q k v", ""),
    "chunk_delta_rule": ("q k v beta", "beta"),
    "fused_chunk_delta_rule": ("q k v beta", "beta"),
    "fused_recurrent_delta_rule": ("q k v beta", "beta"),
    "chunk_gated_delta_rule": ("q k v g beta", "g beta"),
    "chunk_gdn": ("q k v g beta", "g beta"),
    "fused_recurrent_gated_delta_rule": ("q k v gk beta", "g:gk beta"),
    "fused_recurrent_gdn": ("q k v g beta", "g beta"),
    "chunk_kda": ("q k v g:gk beta", "g:gk beta"),
    "fused_recurrent_kda": ("q k v g:gk beta", "g:gk beta"),
    "chunk_rwkv6": ("r:q k v w:gk u", "g:gk u"),
    "fused_recurrent_rwkv6": ("r:q k v w:gk u", "g:gk u"),
    "chunk_dplr_delta_rule": ("q k v a b gk", "g:gk a b"),
    "fused_recurrent_dplr_delta_rule": ("q k v a b gk", "g:gk a b"),
    "chunk_iplr_delta_rule": ("q k v a b", "a b"),
    "fused_recurrent_iplr_delta_rule": ("q k v a b", "a b"),
    "chunk_rwkv7": ("r:q w:gk k v a b", "g:gk a b"),
    "fused_recurrent_rwkv7": ("r:q k v a b log_w:gk", "g:gk a b"),
}
FIXED: dict[str, dict[str, Any]] = {
    "chunk_lightning_attn": {"layer_idx": 2, "num_layers": 7},
    "fused_recurrent_lightning_attn": {"layer_idx": 2, "num_layers": 7},
    "chunk_linear_attn": {"normalize": False},
    "fused_chunk_linear_attn": {"normalize": False},
}


def options_of(name: str) -> set[str]:
    return set(inspect.signature(getattr(fla, name)).parameters)


def with_option(option: str) -> list[str]:
    return [name for name in CASES if option in options_of(name)]


def draw(share: int = 1, batch: int = 2, heads: int = 3, length: int = 37) -> Drawn:
    dim, dim_v = 5, 7
    shape = (batch, length, heads * share)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=torch.float64)

    removed = normalize(normal(*shape, dim), dim=-1)
    counted = torch.arange(heads * share, dtype=torch.float64)
    return {
        "q": normal(batch, length, heads, dim),
        "k": normalize(normal(batch, length, heads, dim), dim=-1),
        "v": normal(*shape, dim_v),
        "g": logsigmoid(normal(*shape)),
        "gk": logsigmoid(normal(*shape, dim)),
        "g_gamma": logsigmoid(normal(heads * share)),
        "beta": 2 * torch.rand(shape, dtype=torch.float64),
        "a": -removed,
        "b": removed * torch.rand((*shape, dim), dtype=torch.float64),
        "u": normal(heads * share, dim),
        "retention": (1 - 2.0 ** (-5 - counted)).log(),
        "lightning": -(8 / (heads * share)) * (1 - 2 / 7) * counted,
    }


def chosen(drawn: Drawn, words: str) -> Drawn:
    pairs = (word.partition(":")[::2] for word in words.split())
    return {name: drawn[source or name] for name, source in pairs}


def plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, states: Tensor, offsets: list[int] | None = None, **rest: Tensor
) -> tuple[Tensor, Tensor]:
    """One sequence, one head, one token after another, in whole matrices."""
    batch, length, heads, _ = v.shape
    q, k = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    if offsets is None:
        stretches = [(b, 0, length) for b in range(batch)]
    else:
        stretches = [(0, start, end) for start, end in pairwise(offsets)]
    out = [[[torch.empty(0)] * heads for _ in range(length)] for _ in range(batch)]
    last = []
    for number, (b, start, end) in enumerate(stretches):
        for h in range(heads):
            state = states[number, h]
            for t in range(start, end):
                before = state
                factor, transition, write = _token(b, t, h, k, v, rest)
                state = (torch.diag(factor) + transition) @ state + write
                own = (rest["u"][h] * k[b, t, h]).outer(v[b, t, h]) if "u" in rest else None
                read = state if own is None else before + own
                out[b][t][h] = scale * q[b, t, h] @ read
            last.append(state)
    outs = torch.stack([torch.stack([torch.stack(row) for row in rows]) for rows in out])
    return outs, torch.stack(last).unflatten(0, (-1, heads))


def _token(b: int, t: int, h: int, k: Tensor, v: Tensor, rest: Drawn) -> tuple[Tensor, Tensor, Tensor]:
    """exp(g), and what else is multiplied with and added to the state."""
    key, value, dim = k[b, t, h], v[b, t, h], k.shape[3]
    g = rest.get("g", torch.zeros(1, dtype=torch.float64).expand(v.shape[2]))
    factor = (g[h] if g.dim() == 1 else g[b, t, h]).exp().expand(dim)
    if "beta" in rest:
        strength = rest["beta"][b, t, h]
        return factor, -strength * key.outer(key * factor), strength * key.outer(value)
    if "a" in rest:
        return factor, rest["b"][b, t, h].outer(rest["a"][b, t, h]), key.outer(value)
    return factor, torch.zeros(dim, dim, dtype=torch.float64), key.outer(value)


def states_for(drawn: Drawn, count: int) -> Tensor:
    return torch.randn(count, drawn["v"].shape[2], drawn["q"].shape[3], drawn["v"].shape[3], dtype=torch.float64)


def both(name: str, drawn: Drawn, count: int, offsets: list[int] | None = None, **more: Any) -> tuple[Any, Any]:
    """What ours and the loop make of a call with everything that the function takes."""
    theirs, meaning = CASES[name]
    states = states_for(drawn, count)
    takes_states = "initial_state" in options_of(name)
    states = states if takes_states else torch.zeros_like(states)
    extra = {"initial_state": states, "output_final_state": True} if takes_states else {}
    got = getattr(fla, name)(**chosen(drawn, theirs), **FIXED.get(name, {}), scale=0.3, **extra, **more)
    wanted = plain(drawn["q"], drawn["k"], drawn["v"], 0.3, states, offsets, **chosen(drawn, meaning))
    return got, wanted if takes_states else (wanted[0], None)


def assert_same(got: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-10, atol=1e-10)
    if wanted[1] is None:
        assert got[1] is None
    else:
        torch.testing.assert_close(got[1], wanted[1], rtol=1e-10, atol=1e-10)
