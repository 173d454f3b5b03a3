"""Gated DeltaNet 2: the delta rule with gates a channel on what is erased and on what is written."""

from __future__ import annotations

from torch import Tensor

from foveate.compat.fla.gates import decay_per_channel, unit
from foveate.compat.fla.layout import Decay, Result, Sequences, check_layout, refuse, run, shared, v_first
from foveate.precision import to_accum


def chunk_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cp_context: object | None = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int | None = None,
    transpose_state_layout: bool | None = None,
) -> Result:
    """Gated DeltaNet 2: S' = Diag(exp(g_t)) S_{t-1}, S_t = S' + k_t (w_t * v_t - (b_t * k_t)^T S')^T.

    >>> import torch
    >>> q, k, v = (torch.randn(2, 10, 4, 8) for _ in range(3))
    >>> g, b, w = -torch.rand(2, 10, 4, 8), torch.rand(2, 10, 4, 8), torch.rand(2, 10, 4, 8)
    >>> o, _ = chunk_gdn2(q, k, v, g, b, w, use_qk_l2norm_in_kernel=True)
    >>> o.shape
    torch.Size([2, 10, 4, 8])

    q and k are [B, T, H, K], v and w [B, T, HV, V], g (log-decays, at most 0) and b [B, T, HV, K], HV a multiple of H.
    With b and w one number a head it is `chunk_kda`, whose gate made inside, options and errors it has.

    Gated DeltaNet 2 of flash-linear-attention 0.6, fla.ops.gdn2; after Yang et al., Gated Delta Networks, 2412.06464.
    """
    refuse(cp_context=cp_context, return_intermediate_states=return_intermediate_states)
    if safe_gate and use_gate_in_kernel and lower_bound is None:
        raise ValueError("safe_gate=True bounds the gate made in the kernel: pass lower_bound, -5 as a rule")
    first = v_first(state_v_first, transpose_state_layout)
    sequences = Sequences(initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu, state_v_first=first)
    check_layout(q, k, v, Decay("g", g, "channel"), b=b)
    if w.shape != v.shape:
        raise ValueError(f"w must be as v, [B, T, HV, V] = {tuple(v.shape)}, got {tuple(w.shape)}")
    g = decay_per_channel(g, A_log, dt_bias, lower_bound) if use_gate_in_kernel else g
    if use_qk_l2norm_in_kernel:
        q, k = unit(q), unit(k)
    key = to_accum(shared(k, v.shape[2]))
    low_rank = to_accum(g).exp() * b * key, -key
    decay = Decay("g", g, "channel")
    o, state = run(q, k, to_accum(v) * w, sequences, decay=decay, low_rank=low_rank, scale=scale)
    return o.to(v.dtype), state


def fused_recurrent_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
) -> Result:
    """`chunk_gdn2` with the arguments of the token-by-token form; differentiable, where theirs is for inference."""
    return chunk_gdn2(
        q,
        k,
        v,
        g,
        b,
        w,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        cu_seqlens,
        lower_bound=lower_bound,
        state_v_first=v_first(state_v_first, transpose_state_layout),
        A_log=A_log,
        dt_bias=dt_bias,
    )
