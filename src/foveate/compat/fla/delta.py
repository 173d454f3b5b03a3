"""The delta rule, gated by head (Gated DeltaNet) and by channel (Kimi Delta Attention)."""

from __future__ import annotations

from torch import Tensor

from foveate.compat.fla.gates import decay_per_channel, decay_per_head, strength, unit
from foveate.compat.fla.layout import Decay, Result, Sequences, refuse, run, v_first


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    head_first: bool | None = None,
) -> Result:
    """The delta rule, S_t = S_{t-1} + beta_t k_t (v_t - k_t^T S_{t-1})^T, with keys of about unit length.

    >>> import torch
    >>> q, k, v = (torch.randn(2, 10, 4, 8) for _ in range(3))
    >>> o, state = chunk_delta_rule(q, k, v, torch.rand(2, 10, 4), use_qk_l2norm_in_kernel=True)
    >>> o.shape, state
    (torch.Size([2, 10, 4, 8]), None)

    q and k are [B, T, H, K], v [B, T, HV, V], beta [B, T, HV], HV a multiple of H; any floating dtype, float32
    included. The state is [N, HV, K, V]. chunk_size is accepted and changes no result.
    Raises ValueError where shapes do not fit.

    Yang et al., Parallelizing Linear Transformers with the Delta Rule over Sequence Length, arXiv 2406.06484.
    """
    refuse(head_first=head_first)
    if use_qk_l2norm_in_kernel:
        q, k = unit(q), unit(k)
    sequences = Sequences(initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu)
    return run(q, k, v, sequences, beta=beta, scale=scale)


fused_chunk_delta_rule = chunk_delta_rule


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    head_first: bool | None = None,
) -> Result:
    """`chunk_delta_rule` with the arguments of the token-by-token form; beta is 1 by default."""
    refuse(head_first=head_first)
    if beta is not None and beta.dim() == 4:
        raise NotImplementedError(
            "beta must be one number a token and head, [B, T, HV]; one a channel is not supported"
        )
    beta = _ones(v) if beta is None else beta
    return chunk_delta_rule(
        q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
    )


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: object | None = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int | None = None,
    head_first: bool | None = None,
    transpose_state_layout: bool | None = None,
) -> Result:
    """The gated delta rule: the state fades by exp(g_t), then takes in what it did not recall of v_t.

    >>> import torch
    >>> q, k, v = torch.randn(1, 10, 2, 8), torch.randn(1, 10, 2, 8), torch.randn(1, 10, 4, 16)
    >>> g, beta = -torch.rand(1, 10, 4), torch.rand(1, 10, 4)
    >>> cu_seqlens = torch.tensor([0, 3, 10])
    >>> o, states = chunk_gated_delta_rule(
    ...     q, k, v, g, beta, use_qk_l2norm_in_kernel=True, output_final_state=True, cu_seqlens=cu_seqlens
    ... )
    >>> o.shape, states.shape
    (torch.Size([1, 10, 4, 16]), torch.Size([2, 4, 8, 16]))

    q and k are [B, T, H, K], v [B, T, HV, V], g (log-decays, at most 0) and beta [B, T, HV], HV a multiple of H.
    use_beta_sigmoid_in_kernel takes beta as logits, allow_neg_eigval doubles them then; use_gate_in_kernel makes the
    decay -exp(A_log) softplus(g + dt_bias), A_log and dt_bias [HV]. chunk_size and chunk_indices change no result.
    Raises ValueError where shapes do not fit, NotImplementedError for cp_context.

    Yang et al., Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv 2412.06464.
    """
    refuse(head_first=head_first, cp_context=cp_context)
    first = v_first(state_v_first, transpose_state_layout)
    sequences = Sequences(initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu, state_v_first=first)
    g = decay_per_head(g, A_log, dt_bias) if use_gate_in_kernel else g
    beta = strength(beta, use_sigmoid=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval)
    if use_qk_l2norm_in_kernel:
        q, k = unit(q), unit(k)
    return run(q, k, v, sequences, decay=Decay("g", g, "token"), beta=beta, scale=scale)


chunk_gdn = chunk_gated_delta_rule


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
) -> Result:
    """`chunk_gated_delta_rule` with the arguments of the token-by-token form.

    gk [B, T, HV, K] are further log-decays, one a channel of the keys; gv raises NotImplementedError.
    """
    refuse(gv=gv)
    first = v_first(state_v_first, transpose_state_layout)
    sequences = Sequences(initial_state, output_final_state, cu_seqlens, state_v_first=first)
    if use_gate_in_kernel:
        if g is None:
            raise ValueError("use_gate_in_kernel=True makes the decay of g [B, T, HV]: pass g")
        g = decay_per_head(g, A_log, dt_bias)
    decay = Decay("g", g, "token")
    if gk is not None:
        decay = Decay("gk", gk if g is None else gk + g.unsqueeze(-1), "channel")
    beta = _ones(v) if beta is None else beta
    beta = strength(beta, use_sigmoid=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval)
    if use_qk_l2norm_in_kernel:
        q, k = unit(q), unit(k)
    return run(q, k, v, sequences, decay=decay, beta=beta, scale=scale)


fused_recurrent_gdn = fused_recurrent_gated_delta_rule


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: object | None = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int | None = None,
    transpose_state_layout: bool | None = None,
) -> Result:
    """Kimi Delta Attention: the gated delta rule with a log-decay a channel, g [B, T, HV, K].

    >>> import torch
    >>> q, k, v = (torch.randn(2, 10, 4, 8) for _ in range(3))
    >>> g, beta, A_log, dt_bias = torch.randn(2, 10, 4, 8), torch.randn(2, 10, 4), torch.zeros(4), torch.zeros(4 * 8)
    >>> o, _ = chunk_kda(
    ...     q, k, v, g, beta, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
    ...     use_beta_sigmoid_in_kernel=True, A_log=A_log, dt_bias=dt_bias,
    ... )
    >>> o.shape
    torch.Size([2, 10, 4, 8])

    use_gate_in_kernel makes the decay -exp(A_log) softplus(g + dt_bias), A_log [HV], dt_bias [HV * K], or with
    lower_bound lower_bound sigmoid(exp(A_log) (g + dt_bias)). safe_gate, disable_recompute, chunk_size and
    max_num_seqs change no result. The rest is as in `chunk_gated_delta_rule`.
    Raises NotImplementedError for cp_context, use_graph and return_intermediate_states.

    Kimi Team, Kimi Linear: An Expressive, Efficient Attention Architecture, arXiv 2510.26692.
    """
    refuse(cp_context=cp_context, use_graph=use_graph, return_intermediate_states=return_intermediate_states)
    if safe_gate and use_gate_in_kernel and lower_bound is None:
        raise ValueError("safe_gate=True bounds the gate made in the kernel: pass lower_bound, -5 as a rule")
    return fused_recurrent_kda(
        q,
        k,
        v,
        g,
        beta,
        A_log,
        dt_bias,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        lower_bound,
        v_first(state_v_first, transpose_state_layout),
        cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
    )


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    cu_seqlens_cpu: Tensor | None = None,
    transpose_state_layout: bool | None = None,
) -> Result:
    """`chunk_kda` with the arguments of the token-by-token form."""
    first = v_first(state_v_first, transpose_state_layout)
    sequences = Sequences(initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu, state_v_first=first)
    g = decay_per_channel(g, A_log, dt_bias, lower_bound) if use_gate_in_kernel else g
    beta = strength(beta, use_sigmoid=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval)
    if use_qk_l2norm_in_kernel:
        q, k = unit(q), unit(k)
    return run(q, k, v, sequences, decay=Decay("g", g, "channel"), beta=beta, scale=scale)


def _ones(v: Tensor) -> Tensor:
    return v.new_ones(v.shape[:3])
