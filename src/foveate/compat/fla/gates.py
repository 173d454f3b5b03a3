"""What flash-linear-attention's kernels can do to their inputs first: unit keys, gates from raw numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from foveate.precision import to_accum

EPSILON = 1e-6


def unit(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6) along the last axis, in x's dtype.

    >>> unit(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """
    x_wide = to_accum(x)
    return (x_wide * (x_wide.square().sum(-1, keepdim=True) + EPSILON).rsqrt()).to(x.dtype)


def strength(beta: Tensor, *, use_sigmoid: bool, allow_neg_eigval: bool) -> Tensor:
    """Writing strengths from logits: in (0, 1), or in (0, 2) with ``allow_neg_eigval``."""
    if allow_neg_eigval and not use_sigmoid:
        raise ValueError("allow_neg_eigval doubles sigmoid(beta): it needs use_beta_sigmoid_in_kernel=True")
    if not use_sigmoid:
        return beta
    return torch.sigmoid(to_accum(beta)) * (2 if allow_neg_eigval else 1)


def decay_per_head(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> Tensor:
    """-exp(A_log) softplus(g + dt_bias), g [B, T, H], A_log and dt_bias [H]: the gate of Gated DeltaNet."""
    if A_log is None:
        raise ValueError("the decay is made of A_log [H]: pass A_log")
    _check_size("A_log", A_log, g.shape[-1])
    if dt_bias is not None:
        _check_size("dt_bias", dt_bias, g.shape[-1])
        g = to_accum(g) + to_accum(dt_bias)
    return -to_accum(A_log).exp() * softplus(to_accum(g))


def decay_per_channel(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """The gate of Kimi Delta Attention, g [B, T, H, K], A_log [H], dt_bias [H * K].

    -exp(A_log) softplus(g + dt_bias), or with a bound lower_bound sigmoid(exp(A_log) (g + dt_bias)).
    """
    heads, dim = g.shape[-2:]
    g = to_accum(g)
    if dt_bias is not None:
        _check_size("dt_bias", dt_bias, heads * dim)
        g = g + to_accum(dt_bias).reshape(heads, dim)
    if A_log is not None:
        _check_size("A_log", A_log, heads)
    rate = None if A_log is None else to_accum(A_log).exp().reshape(heads, 1)
    if lower_bound is not None:
        if lower_bound >= 0:
            raise ValueError(f"lower_bound bounds log-decays, which are negative, got {lower_bound}; -5 is usual")
        return lower_bound * torch.sigmoid(g if rate is None else rate * g)
    if rate is None:
        raise ValueError("the decay is made of A_log [H], or bounded without it: pass A_log, or lower_bound")
    return -rate * softplus(g)


def fused_gdn_gate(
    g: Tensor, A_log: Tensor, dt_bias: Tensor | None = None, output_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The log-decay of Gated DeltaNet, -exp(A_log) softplus(g + dt_bias), g [..., HV], A_log and dt_bias [HV].

    >>> fused_gdn_gate(torch.zeros(1, 10, 4), torch.zeros(4))[0, 0]
    tensor([-0.6931, -0.6931, -0.6931, -0.6931])

    Computed in float32, or float64 if g is that; ``output_dtype`` is float32 by default whatever g's is, there as here.
    """
    return decay_per_head(g, A_log, dt_bias).to(output_dtype)


def fused_kda_gate(
    g: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The log-decay of Kimi Delta Attention, g [..., H, K], A_log [H], dt_bias [H * K].

    -exp(A_log) softplus(g + dt_bias), or with a bound lower_bound sigmoid(exp(A_log) (g + dt_bias)).

    >>> fused_kda_gate(torch.zeros(1, 10, 4, 8), lower_bound=-5.0)[0, 0, 0, 0]
    tensor(-2.5000)

    The dtypes are as in `fused_gdn_gate`.
    """
    return decay_per_channel(g, A_log, dt_bias, lower_bound).to(output_dtype)


def fused_beta_sigmoid(x: Tensor, scale: float = 1.0) -> Tensor:
    """Writing strengths scale * sigmoid(x) from logits of any shape, in float32, or float64 if x is that.

    >>> fused_beta_sigmoid(torch.zeros(2), scale=2.0)
    tensor([1., 1.])
    """
    return scale * torch.sigmoid(to_accum(x))


def _check_size(name: str, x: Tensor, size: int) -> None:
    if x.numel() != size:
        raise ValueError(f"{name} must have {size} numbers beside this g, got {tuple(x.shape)}")
