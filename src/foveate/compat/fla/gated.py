"""Additive states that fade by a number or a vector a token: gated linear attention and its simple form."""

from __future__ import annotations

from torch import Tensor

from foveate.compat.fla.layout import Decay, Result, Sequences, refuse, run, v_first


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    head_first: bool | None = None,
) -> Result:
    """Gated linear attention, S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T. HGRN-2 is this with k = 1 - exp(g).

    >>> import torch
    >>> q, k, v = (torch.randn(2, 10, 4, 8) for _ in range(3))
    >>> o, state = chunk_gla(q, k, v, -torch.rand(2, 10, 4, 8), output_final_state=True)
    >>> o.shape, state.shape
    (torch.Size([2, 10, 4, 8]), torch.Size([2, 4, 8, 8]))

    q, k and g (log-decays, at most 0) are [B, T, H, K], v [B, T, H, V] of any floating dtype, the state float32
    [N, H, K, V], or [N, H, V, K] with state_v_first. cu_seqlens [N + 1] are offsets of sequences packed in B = 1.
    Raises ValueError where shapes do not fit.

    Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv 2312.06635.
    """
    refuse(head_first=head_first)
    sequences = Sequences(initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu, state_v_first=state_v_first)
    return run(q, k, v, sequences, decay=Decay("g", g, "channel"), scale=scale)


fused_chunk_gla = chunk_gla


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    head_first: bool | None = None,
    transpose_state_layout: bool | None = None,
) -> Result:
    """`chunk_gla` under the names of the token-by-token form; ``reverse`` runs from the last token to the first.

    >>> import torch
    >>> q, k, v = (torch.randn(2, 10, 4, 8) for _ in range(3))
    >>> fused_recurrent_gla(q, k, v, gk=-torch.rand(2, 10, 4, 8), reverse=True)[0].shape
    torch.Size([2, 10, 4, 8])

    gv raises NotImplementedError.
    """
    refuse(gv=gv, head_first=head_first)
    first = v_first(state_v_first, transpose_state_layout)
    sequences = Sequences(initial_state, output_final_state, cu_seqlens, None, reverse, first)
    return run(q, k, v, sequences, decay=Decay("gk", gk, "channel"), scale=scale)


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    head_first: bool | None = None,
) -> Result:
    """Gated attention with one log-decay a token and head, g [B, T, H], or a head, g_gamma [H]; Mamba-2 has it.

    >>> import torch
    >>> q, k, v = (torch.randn(2, 10, 4, 8) for _ in range(3))
    >>> o, state = chunk_simple_gla(q, k, v, -torch.rand(2, 10, 4))
    >>> o.shape, state
    (torch.Size([2, 10, 4, 8]), None)

    The rest is as in `chunk_gla`. chunk_size is accepted and changes no result.
    """
    refuse(head_first=head_first)
    sequences = Sequences(initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu, state_v_first=state_v_first)
    return run(q, k, v, sequences, decay=_one_gate(g, g_gamma), scale=scale)


def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """`chunk_simple_gla` with the arguments of the fused form."""
    return run(
        q, k, v, Sequences(initial_state, output_final_state, cu_seqlens), decay=_one_gate(g, g_gamma), scale=scale
    )


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
) -> Result:
    """`chunk_simple_gla` with the arguments of the token-by-token form."""
    first = v_first(state_v_first, transpose_state_layout)
    sequences = Sequences(initial_state, output_final_state, cu_seqlens, None, reverse, first)
    return run(q, k, v, sequences, decay=_one_gate(g, g_gamma), scale=scale)


def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> Result:
    """`chunk_simple_gla` with the arguments of the parallel form; (o, None), without weights."""
    refuse(output_attentions=output_attentions)
    sequences = Sequences(cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu)
    return run(q, k, v, sequences, decay=_one_gate(g, None), scale=scale)


def _one_gate(g: Tensor | None, g_gamma: Tensor | None) -> Decay:
    if g is not None and g_gamma is not None:
        raise ValueError("g [B, T, H] and g_gamma [H] both say how the state fades; pass one of them")
    return Decay("g", g, "token") if g_gamma is None else Decay("g_gamma", g_gamma, "head")
