"""Mamba-2's scan, whose states fade by one number a head."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from foveate.compat.fla.layout import shared
from foveate.compat.mamba.packing import check, refuse, run_lengths
from foveate.precision import accum_dtype, to_accum
from foveate.recurrence import recur


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t, times silu(z_t).

    >>> import torch
    >>> x, dt, A = torch.randn(2, 10, 4, 16), torch.randn(2, 10, 4), -torch.rand(4)
    >>> B, C = torch.randn(2, 10, 2, 8), torch.randn(2, 10, 2, 8)
    >>> out, state = mamba_chunk_scan_combined(
    ...     x, dt, A, B, C, chunk_size=256, dt_softplus=True, return_final_states=True
    ... )
    >>> out.shape, state.shape
    (torch.Size([2, 10, 4, 16]), torch.Size([2, 4, 16, 8]))

    x and z are (batch, tokens, heads, head dim), dt (batch, tokens, heads), A and dt_bias (heads,), B and C (batch,
    tokens, groups, state dim), D (heads,) or (heads, head dim), states (batch, heads, head dim, state dim). dt, plus
    its bias, goes through softplus if asked, then into dt_limit. seq_idx (batch, tokens) begins a new sequence
    wherever its number changes; the final states are then those of the last ones. Any floating dtype. States are
    float32, or float64 if x, dt, A, B or C is, and never less precise than ``state_dtype``: torch.float64 makes them,
    and all inside, float64.
    chunk_size changes no result; cu_seqlens is only for return_varlen_states, there as here.
    Raises ValueError where shapes do not fit, NotImplementedError for return_varlen_states and for initial_states
    beside seq_idx.

    Dao & Gu, Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
    Duality, arXiv 2405.21060.
    """
    refuse(return_varlen_states=(return_varlen_states, "call it for each sequence with return_final_states"))
    if seq_idx is not None:
        refuse(initial_states=(initial_states, "beside seq_idx it is not told which sequence it begins"))
    _check(x, dt, A, B, C, D, z, dt_bias, initial_states)
    dtype = _state_dtype(state_dtype, x, dt, A, B, C)
    step = _step(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
    out, state = _scan(x, step, A.to(dtype), B, C, initial_states, seq_idx)
    if D is not None:
        out = out + x.to(out.dtype) * (D.unsqueeze(-1) if D.dim() == 1 else D)
    if z is not None:
        out = out * silu(to_accum(z))
    return (out.to(x.dtype), state) if return_final_states else out.to(x.dtype)


def _scan(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Out (batch, tokens, heads, head dim), and the states after the last tokens, both in the dtype of step."""
    batch, num_tokens, heads, _ = x.shape
    rows = None if seq_idx is None else run_lengths(seq_idx, batch, num_tokens)

    def facing(t: Tensor) -> Tensor:
        return (t if rows is None else t.flatten(0, 1).unsqueeze(0)).transpose(1, 2)

    out, last = recur(
        facing(shared(C, heads)),
        facing(B),
        facing(x * step.unsqueeze(-1)),
        decay=facing(step * A),
        scale=1.0,
        state=None if state is None else state.to(step.dtype).mT,
        lengths=None if rows is None else [length for row in rows for length in row],
    )
    if rows is not None:
        last = last[[number - 1 for number in accumulate(map(len, rows))]]
    return out.transpose(1, 2).reshape(x.shape), last.mT


def _state_dtype(wanted: torch.dtype | None, *tensors: Tensor) -> torch.dtype:
    if wanted is not None and not wanted.is_floating_point:
        raise TypeError(f"state_dtype must be a floating dtype, got {wanted}")
    return torch.float64 if wanted == torch.float64 else accum_dtype(*tensors)


def _step(dt: Tensor, bias: Tensor | None, use_softplus: bool, limits: tuple[float, float]) -> Tensor:
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    dt = softplus(dt) if use_softplus else dt
    return dt if limits == (0.0, float("inf")) else dt.clamp(*limits)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
) -> None:
    if x.dim() != 4 or B.dim() != 4:
        raise ValueError(
            f"x must be (batch, tokens, heads, head dim), B and C (batch, tokens, groups, state dim), got "
            f"{tuple(x.shape)} and {tuple(B.shape)}"
        )
    batch, num_tokens, heads, dim = x.shape
    groups, dim_state = B.shape[2:]
    if heads % groups:
        raise ValueError(f"the {heads} heads of x must be a multiple of the {groups} groups of B")
    check("dt", dt, (batch, num_tokens, heads))
    check("A", A, (heads,))
    for name, t in (("B", B), ("C", C)):
        check(name, t, (batch, num_tokens, groups, dim_state))
    check("D", D, (heads,), (heads, dim))
    check("z", z, tuple(x.shape))
    check("dt_bias", dt_bias, (heads,))
    check("initial_states", initial_states, (batch, heads, dim, dim_state))
