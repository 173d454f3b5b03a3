"""What the tests of linear attention on text share: small mixers, and the formulas' common parts written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from foveate.cache import KVCache
from foveate.mixers.base import Mixer, split_heads

DIM, HEADS, LENGTH = 24, 4, 37


def make(kind: type[Mixer], *, moved: bool = True, **options: Any) -> Any:
    """A mixer in float64, as it starts or with no parameter at a special value."""
    mixer = kind(DIM, **options).double()  # type: ignore[call-arg]
    for parameter in mixer.parameters() if moved else ():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return mixer


def tokens(length: int = LENGTH, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def project(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, N, D)."""
    return tuple(split_heads(layer(x), mixer.heads) for layer in (mixer.to_q, mixer.to_k, mixer.to_v))


def shifted_sum(taps: Tensor, flat: Tensor) -> Tensor:
    """A causal convolution of flat (B, N, C) with taps (C, width), the last of which reads the token itself."""
    width = taps.shape[1]
    ages = (torch.cat([torch.zeros_like(flat[:, :age]), flat[:, : flat.shape[1] - age]], 1) for age in range(width))
    return sum(taps[:, width - 1 - age] * shifted for age, shifted in enumerate(ages))  # type: ignore[return-value]


def fading_sum(q: Tensor, k: Tensor, v: Tensor, factors: Tensor) -> Tensor:
    """q_t^T S_t of S_t = Diag(factors_t) S_{t-1} + k_t v_t^T, all (B, H, N, ...)."""
    state, outs = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=k.dtype), []
    for t in range(k.shape[2]):
        state = factors[:, :, t].unsqueeze(-1) * state + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        outs.append(q[:, :, t].unsqueeze(-2) @ state)
    return torch.cat(outs, 2)


def rms(x: Tensor, eps: float = 1e-5) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def standard(x: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def ages(length: int) -> Tensor:
    """How many tokens before each query (row) each key lies; negative for later keys."""
    return (torch.arange(length)[:, None] - torch.arange(length)).double()


def row_shares(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def held(state: Any) -> int:
    """Bytes of the floating tensors and the caches in a state."""
    leaves = tree_leaves(state)
    return sum(x.nbytes for x in leaves if isinstance(x, KVCache) or (isinstance(x, Tensor) and x.is_floating_point()))


def decoded(mixer: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Tokens one after another from a state."""
    outs = []
    for t in range(x.shape[1]):
        out, state = mixer.decode(x[:, t : t + 1], state)
        outs.append(out)
    return torch.cat(outs, 1), state
