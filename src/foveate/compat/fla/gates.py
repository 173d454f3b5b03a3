"""What flash-linear-attention's kernels can do to their inputs first: unit keys, gates from raw numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from foveate.compat.widen import wide

EPSILON = 1e-6


def unit(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6) along the last axis, in x's dtype.

    >>> unit(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """
    x_wide = wide(x)
    return (x_wide * (x_wide.square().sum(-1, keepdim=True) + EPSILON).rsqrt()).to(x.dtype)


def strength(beta: Tensor, *, use_sigmoid: bool, allow_neg_eigval: bool) -> Tensor:
    """Writing strengths from logits: in (0, 1), or in (0, 2) with ``allow_neg_eigval``."""
    if allow_neg_eigval and not use_sigmoid:
        raise ValueError("allow_neg_eigval doubles sigmoid(beta): it needs use_beta_sigmoid_in_kernel=True")
    if not use_sigmoid:
        return beta
    return torch.sigmoid(wide(beta)) * (2 if allow_neg_eigval else 1)


def decay_per_head(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> Tensor:
    """-exp(A_log) softplus(g + dt_bias), g [B, T, H], A_log and dt_bias [H]: the gate of Gated DeltaNet."""
    if A_log is None:
        raise ValueError("use_gate_in_kernel=True makes the decay of A_log [H]: pass A_log")
    _check_size("A_log", A_log, g.shape[-1])
    if dt_bias is not None:
        _check_size("dt_bias", dt_bias, g.shape[-1])
        g = wide(g) + dt_bias
    return -wide(A_log).exp() * softplus(wide(g))


def decay_per_channel(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """The gate of Kimi Delta Attention, g [B, T, H, K], A_log [H], dt_bias [H * K].

    -exp(A_log) softplus(g + dt_bias), or with a bound lower_bound sigmoid(exp(A_log) (g + dt_bias)).
    """
    heads, dim = g.shape[-2:]
    g = wide(g)
    if dt_bias is not None:
        _check_size("dt_bias", dt_bias, heads * dim)
        g = g + dt_bias.reshape(heads, dim)
    if A_log is not None:
        _check_size("A_log", A_log, heads)
    rate = None if A_log is None else wide(A_log).exp().reshape(heads, 1)
    if lower_bound is not None:
        if lower_bound >= 0:
            raise ValueError(f"lower_bound bounds log-decays, which are negative, got {lower_bound}; -5 is usual")
        return lower_bound * torch.sigmoid(g if rate is None else rate * g)
    if rate is None:
        raise ValueError("use_gate_in_kernel=True makes the decay of A_log [H]: pass A_log, or lower_bound")
    return -rate * softplus(g)


def _check_size(name: str, x: Tensor, size: int) -> None:
    if x.numel() != size:
        raise ValueError(f"{name} must have {size} numbers beside this g, got {tuple(x.shape)}")
