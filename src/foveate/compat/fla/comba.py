"""Comba: a gated delta rule that recalls by one key and writes by another."""

from __future__ import annotations

from torch import Tensor

from foveate.compat.fla.gates import unit
from foveate.compat.fla.layout import Decay, Result, Sequences, check_layout, run, shared
from foveate.precision import to_accum


def chunk_comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor | None,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> Result:
    """Comba: S' = exp(g_t) S_{t-1}, S_t = S' + beta_t k_t (v_t - p_t^T S')^T.

    >>> import torch
    >>> q, k, v = (torch.randn(2, 10, 4, 8) for _ in range(3))
    >>> g, beta = -torch.rand(2, 10, 4), torch.rand(2, 10, 4)
    >>> o, _ = chunk_comba(q, k, v, 0.5 * k, g, beta, use_qk_l2norm_in_kernel=True)
    >>> o.shape
    torch.Size([2, 10, 4, 8])

    q, k and p (k if None) are [B, T, H, K], v [B, T, HV, V], g (log-decays, at most 0) and beta (1 if None) [B, T, HV],
    HV a multiple of H; use_qk_l2norm_in_kernel makes q, k and p unit. The rest is as in `chunk_gated_delta_rule`.

    Hu et al., Comba: Improving Bilinear RNNs with Closed-loop Control, arXiv 2506.02475.
    """
    p = k if p is None else p
    check_layout(q, k, v, Decay("g", g, "token"), beta=beta)
    if p.shape != k.shape:
        raise ValueError(f"p must be as k, [B, T, H, K] = {tuple(k.shape)}, got {tuple(p.shape)}")
    if use_qk_l2norm_in_kernel:
        q, k, p = unit(q), unit(k), unit(p)
    heads, strength = v.shape[2], v.new_ones(v.shape[:3]) if beta is None else beta
    low_rank = (
        to_accum(g).exp().unsqueeze(-1) * to_accum(shared(p, heads)),
        -to_accum(strength).unsqueeze(-1) * shared(k, heads),
    )
    sequences = Sequences(initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu)
    write = to_accum(v) * strength.unsqueeze(-1)
    o, state = run(q, k, write, sequences, decay=Decay("g", g, "token"), low_rank=low_rank, scale=scale)
    return o.to(v.dtype), state


def fused_recurrent_comba(
    q: Tensor,
    k: Tensor,
    p: Tensor | None,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """`chunk_comba` with the arguments of the token-by-token form: p stands before v."""
    return chunk_comba(
        q, k, v, p, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
    )
