"""Mamba's selective scan, over a sequence and for one token."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.compat.mamba.packing import check
from foveate.precision import accum_dtype
from foveate.recurrence.selective.api import scan, scan_step


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """S6: h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t, y_t = C_t . h_t + D u_t, times silu(z_t).

    >>> u, delta, A = torch.randn(2, 6, 10), torch.randn(2, 6, 10), -torch.rand(6, 4)
    >>> B, C = torch.randn(2, 4, 10), torch.randn(2, 4, 10)
    >>> y, state = selective_scan_fn(u, delta, A, B, C, delta_softplus=True, return_last_state=True)
    >>> y.shape, state.shape
    (torch.Size([2, 6, 10]), torch.Size([2, 6, 4]))

    u, delta and z are (batch, channels, tokens), A (channels, state dim) real and negative, B and C (batch, state dim,
    tokens), (batch, groups, state dim, tokens) or, constant, (channels, state dim); D and delta_bias (channels,).
    Raises ValueError where shapes do not fit, NotImplementedError for complex A.

    Gu & Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, arXiv 2312.00752.
    """
    if A.is_complex():
        raise NotImplementedError("A must be real: complex states are not supported by foveate.compat.mamba")
    if u.dim() != 3 or A.dim() != 2 or A.shape[0] != u.shape[1]:
        raise ValueError(
            f"u must be (batch, channels, tokens) and A (channels, state dim), got {tuple(u.shape)}, {tuple(A.shape)}"
        )
    check("delta", delta, tuple(u.shape))
    check("z", z, tuple(u.shape))
    out, state = scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        _tokens_first(B, "B", u, A),
        _tokens_first(C, "C", u, A),
        D=D,
        z=None if z is None else z.transpose(1, 2),
        dt_bias=delta_bias,
        softplus=delta_softplus,
    )
    return (out.transpose(1, 2), state) if return_last_state else out.transpose(1, 2)


def _tokens_first(x: Tensor, name: str, u: Tensor, A: Tensor) -> Tensor:
    """B or C as (batch, tokens, state dim) or (batch, tokens, groups, state dim)."""
    batch, _, num_tokens = u.shape
    if tuple(x.shape) == tuple(A.shape):
        return x.expand(batch, num_tokens, -1, -1)
    if x.dim() not in (3, 4) or x.shape[0] != batch or x.shape[-2:] != (A.shape[1], num_tokens):
        raise ValueError(
            f"{name} must be (batch, state dim, tokens), (batch, groups, state dim, tokens) or (channels, state dim) "
            f"beside u {tuple(u.shape)} and A {tuple(A.shape)}, got {tuple(x.shape)}"
        )
    return x.transpose(1, 2) if x.dim() == 3 else x.permute(0, 3, 1, 2)


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of `selective_scan_fn`; ``state`` is overwritten, there as here, and nothing is differentiated.

    >>> state, A = torch.zeros(2, 6, 4), -torch.rand(6, 4)
    >>> x, dt = torch.randn(2, 6), torch.rand(2, 6)
    >>> selective_state_update(state, x, dt, A, torch.randn(2, 4), torch.randn(2, 4)).shape
    torch.Size([2, 6])

    state is (batch, channels, state dim), x, dt and z (batch, channels), A (channels, state dim), B and C (batch,
    state dim), D and dt_bias (channels,). With heads, as in Mamba-2: state (batch, heads, dim, state dim), x, dt and z
    (batch, heads, dim), A (heads, dim, state dim), B and C (batch, groups, state dim), D and dt_bias (heads, dim).
    state_batch_indices (batch,) are rows of a larger state. Raises ValueError where shapes do not fit.
    """
    channels = tuple(state.shape[1:-1])
    batch = x.shape[0]
    check("A", A, (*channels, state.shape[-1]))
    for name, tensor in (("x", x), ("dt", dt), ("z", z)):
        check(name, tensor, (batch, *channels))
    for name, tensor in (("D", D), ("dt_bias", dt_bias)):
        check(name, tensor, channels)

    rows = state if state_batch_indices is None else state[state_batch_indices]
    check("state", rows, (batch, *channels, state.shape[-1]))
    given = [t for t in (x, dt, A, B, C, D, z, dt_bias) if t is not None]
    out, new = scan_step(
        x.flatten(1).unsqueeze(1),
        dt.flatten(1).unsqueeze(1),
        A.flatten(0, -2),
        B.unsqueeze(1),
        C.unsqueeze(1),
        D=None if D is None else D.flatten(),
        z=None if z is None else z.flatten(1).unsqueeze(1),
        dt_bias=None if dt_bias is None else dt_bias.flatten(),
        softplus=dt_softplus,
        state=rows.flatten(1, -2).to(accum_dtype(*given)),
    )
    new = new.reshape(rows.shape).to(state.dtype)
    if state_batch_indices is None:
        state.copy_(new)
    else:
        state[state_batch_indices] = new
    return out.reshape(x.shape)
