"""mamba_ssm's fused blocks: all of Mamba's layer after its input projection, and all of Mamba-2's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from foveate.compat.mamba.conv import causal_conv1d_fn
from foveate.compat.mamba.norm import rmsnorm_fn
from foveate.compat.mamba.packing import check
from foveate.compat.mamba.selective import selective_scan_fn
from foveate.compat.mamba.ssd import mamba_chunk_scan_combined
from foveate.precision import to_accum


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Mamba's layer after its input projection: short convolution, selective scan, gate and output projection.

    >>> xz, A = torch.randn(2, 12, 10), -torch.rand(6, 4)
    >>> x_proj, dt_proj, out_proj = torch.randn(3 + 2 * 4, 6), torch.randn(6, 3), torch.randn(5, 6)
    >>> mamba_inner_fn(xz, torch.randn(6, 1, 4), None, x_proj, dt_proj, out_proj, None, A).shape
    torch.Size([2, 10, 5])

    xz is (batch, 2 channels, tokens), x before z; conv1d_weight (channels, 1, width); x_proj_weight (rank + 2 state
    dim, channels), whose outputs are delta's rank, B and C; delta_proj_weight (channels, rank); out_proj_weight (out,
    channels). B and C given replace the projected ones. The rms weights, (state dim,) and (channels,), normalise B, C
    and delta. checkpoint_lvl, 0 or 1, is about memory and changes no result. Out is (batch, tokens, out).
    Raises ValueError where shapes do not fit, NotImplementedError for complex A.

    Gu & Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, arXiv 2312.00752.
    """
    _check_inner(xz, conv1d_weight, x_proj_weight, delta_proj_weight, A, checkpoint_lvl)
    x, z = xz.chunk(2, dim=1)
    convolved = causal_conv1d_fn(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    assert isinstance(convolved, Tensor)
    dim_state, rank = A.shape[1], delta_proj_weight.shape[1]
    projected = linear(convolved.transpose(1, 2), x_proj_weight)  # (batch, tokens, rank + 2 state dim)
    delta = linear(projected[..., :rank], delta_proj_weight)
    if B is None:
        B = _of_tokens(projected[..., rank : rank + dim_state], B_proj_bias, b_rms_weight, b_c_dt_rms_eps)
    elif b_rms_weight is not None:
        raise ValueError("b_rms_weight normalises the B that x_proj_weight makes; leave out B or it")
    if C is None:
        C = _of_tokens(projected[..., -dim_state:], C_proj_bias, c_rms_weight, b_c_dt_rms_eps)
    elif c_rms_weight is not None:
        raise ValueError("c_rms_weight normalises the C that x_proj_weight makes; leave out C or it")
    delta = _of_tokens(delta, None, dt_rms_weight, b_c_dt_rms_eps)
    y = selective_scan_fn(convolved, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus)
    assert isinstance(y, Tensor)
    return linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def _of_tokens(x: Tensor, bias: Tensor | None, rms_weight: Tensor | None, eps: float) -> Tensor:
    """x (batch, tokens, dim) plus its bias, normalised where a weight is given, as (batch, dim, tokens)."""
    x = x if bias is None else x + bias.to(x.dtype)
    if rms_weight is not None:
        check("an rms weight", rms_weight, tuple(x.shape[-1:]))
        x = rms_norm(to_accum(x), x.shape[-1:], to_accum(rms_weight), eps).to(x.dtype)
    return x.transpose(1, 2)


def _check_inner(xz: Tensor, conv: Tensor, x_proj: Tensor, dt_proj: Tensor, A: Tensor, level: int) -> None:
    if A.is_complex():
        raise NotImplementedError("A must be real: complex states are not supported by foveate.compat.mamba")
    if xz.dim() != 3 or A.dim() != 2 or dt_proj.dim() != 2 or xz.shape[1] != 2 * A.shape[0]:
        raise ValueError(
            f"xz must be (batch, 2 channels, tokens), A (channels, state dim) and delta_proj_weight (channels, rank), "
            f"got {tuple(xz.shape)}, {tuple(A.shape)} and {tuple(dt_proj.shape)}"
        )
    (channels, dim_state), rank = A.shape, dt_proj.shape[1]
    check("conv1d_weight", conv, (channels, 1, conv.shape[-1]))
    check("x_proj_weight", x_proj, (rank + 2 * dim_state, channels))
    check("delta_proj_weight", dt_proj, (channels, rank))
    if level not in (0, 1):
        raise ValueError(f"checkpoint_lvl must be 0 or 1, got {level!r}")


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's layer after its input projection: convolution, scan, gate or gated norm, and output projection.

    >>> zxbcdt = torch.randn(2, 10, 2 * 8 + 2 * 3 + 4)  # z and x of 4 heads of 2 channels, B and C of 3, dt
    >>> out = mamba_split_conv1d_scan_combined(
    ...     zxbcdt, torch.randn(14, 4), None, torch.zeros(4), -torch.rand(4), torch.ones(4), chunk_size=256, headdim=2
    ... )
    >>> out.shape
    torch.Size([2, 10, 8])

    zxbcdt is (batch, tokens, 2 * extra + 2 * dim + 2 * ngroups * state dim + heads), dim = heads * headdim: the two
    halves of an MLP, if there is one, then z, x, B, C and dt. conv1d_weight is (dim + 2 * ngroups * state dim, width),
    dt_bias and A (heads,), D (heads,) beside ``headdim`` or (heads, headdim), rmsnorm_weight (dim,), outproj_weight
    (out, extra + dim). Without rmsnorm_weight the scan is gated by silu(z); with it, by a norm over groups of
    dim / ngroups channels as in `rmsnorm_fn`. The MLP's part of the output, silu(first) * second, comes first.
    The rest is as in `mamba_chunk_scan_combined`. Raises ValueError where shapes do not fit.

    Dao & Gu, Transformers are SSMs, arXiv 2405.21060.
    """
    heads, head_dim, dim_state, extra = _sizes(zxbcdt, conv1d_weight, D, headdim, ngroups)
    dim = heads * head_dim
    if outproj_weight is None and outproj_bias is not None:
        raise ValueError("outproj_bias is added after outproj_weight: pass outproj_weight as well")
    first, second, z, xBC, dt = zxbcdt.split([extra, extra, dim, dim + 2 * ngroups * dim_state, heads], dim=-1)
    convolved = causal_conv1d_fn(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    assert isinstance(convolved, Tensor)
    x, B, C = convolved.transpose(1, 2).split([dim, ngroups * dim_state, ngroups * dim_state], dim=-1)
    out, states = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, head_dim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, dim_state)),
        C.unflatten(-1, (ngroups, dim_state)),
        chunk_size,
        D,
        z.unflatten(-1, (heads, head_dim)) if rmsnorm_weight is None else None,
        dt_bias,
        initial_states,
        seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
        state_dtype=state_dtype,
    )
    out = out.flatten(-2)
    if rmsnorm_weight is not None:
        out = rmsnorm_fn(out, rmsnorm_weight, None, z, rmsnorm_eps, dim // ngroups, norm_before_gate)
    if extra:
        out = torch.cat([silu(first) * second, out], dim=-1)
    if outproj_weight is not None:
        out = linear(out, outproj_weight, outproj_bias)
    return (out, states) if return_final_states else out


def _sizes(
    zxbcdt: Tensor, conv1d_weight: Tensor, D: Tensor, headdim: int | None, ngroups: int
) -> tuple[int, int, int, int]:
    """Heads, head dim, state dim, and half the width of the MLP."""
    if D.dim() == 1 and headdim is None:
        raise ValueError("headdim cannot be told from D (heads,): pass headdim, or D as (heads, headdim)")
    if D.dim() not in (1, 2) or zxbcdt.dim() != 3 or conv1d_weight.dim() != 2:
        raise ValueError(
            f"zxbcdt must be (batch, tokens, width), conv1d_weight (channels, width) and D (heads,) or (heads, "
            f"headdim), got {tuple(zxbcdt.shape)}, {tuple(conv1d_weight.shape)} and {tuple(D.shape)}"
        )
    heads, head_dim = D.shape[0], D.shape[1] if D.dim() == 2 else headdim or 0
    dim, width = heads * head_dim, zxbcdt.shape[2]
    if ngroups < 1 or heads % ngroups:
        raise ValueError(f"ngroups must divide the {heads} heads, got {ngroups}")
    dim_state, odd = divmod(conv1d_weight.shape[0] - dim, 2 * ngroups)
    extra, odder = divmod(width - 2 * dim - 2 * ngroups * dim_state - heads, 2)
    if odd or odder or dim_state < 1 or extra < 0:
        raise ValueError(
            f"conv1d_weight must have heads * headdim + 2 * ngroups * state dim channels and zxbcdt that plus heads * "
            f"headdim + heads (and an MLP's), got {conv1d_weight.shape[0]} and {width} beside {heads} heads of "
            f"{head_dim} and {ngroups} groups"
        )
    return heads, head_dim, dim_state, extra
