"""States turned by a low-rank matrix a token (RWKV-7 and what it is a case of), and RWKV-6 with its bonus."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.compat.fla.layout import Decay, Result, Sequences, refuse, run


def chunk_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    head_first: bool | None = None,
) -> Result:
    """RWKV-6: o_t = scale r_t^T (S_{t-1} + (u * k_t) v_t^T), S_t = Diag(exp(w_t)) S_{t-1} + k_t v_t^T.

    >>> import torch
    >>> r, k, v = (torch.randn(2, 10, 4, 8) for _ in range(3))
    >>> o, _ = chunk_rwkv6(r, k, v, -torch.rand(2, 10, 4, 8), torch.randn(4, 8))
    >>> o.shape
    torch.Size([2, 10, 4, 8])

    r, k and w (log-decays, at most 0) are [B, T, H, K], v [B, T, H, V], u [H, K]. chunk_size changes no result.

    Peng et al., Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence, arXiv 2404.05892.
    """
    refuse(head_first=head_first)
    sequences = Sequences(initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu)
    return run(r, k, v, sequences, decay=Decay("w", w, "channel"), bonus=u, scale=scale)


def fused_recurrent_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    head_first: bool | None = None,
) -> Result:
    """`chunk_rwkv6` with the arguments of the token-by-token form."""
    refuse(head_first=head_first)
    sequences = Sequences(initial_state, output_final_state, cu_seqlens, None, reverse)
    return run(r, k, v, sequences, decay=Decay("w", w, "channel"), bonus=u, scale=scale)


def chunk_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    chunk_size: int | None = None,
    disable_recompute: bool = False,
    cp_context: object | None = None,
    lower_bound: float | None = None,
    *,
    head_first: bool | None = None,
) -> Result:
    """Diagonal plus low rank: S_t = Diag(exp(gk_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T.

    >>> import torch
    >>> q, k, v = (torch.randn(2, 10, 4, 8) for _ in range(3))
    >>> a = torch.nn.functional.normalize(torch.randn(2, 10, 4, 8), dim=-1)
    >>> o, _ = chunk_dplr_delta_rule(q, k, v, a, -a, -torch.rand(2, 10, 4, 8))
    >>> o.shape
    torch.Size([2, 10, 4, 8])

    q, k, a, b and gk (log-decays, at most 0) are [B, T, H, K], v [B, T, H, V], any floating dtype, float32 included.
    safe_gate, lower_bound, chunk_size and disable_recompute change no result: decays of any strength are safe here.
    Raises NotImplementedError for cp_context.

    Peng et al., RWKV-7 "Goose" with Expressive Dynamic State Evolution, arXiv 2503.14456.
    """
    refuse(head_first=head_first, cp_context=cp_context)
    sequences = Sequences(initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu)
    return run(q, k, v, sequences, decay=Decay("gk", gk, "channel"), low_rank=(a, b), scale=scale)


def fused_recurrent_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    head_first: bool | None = None,
) -> Result:
    """`chunk_dplr_delta_rule` with the arguments of the token-by-token form."""
    refuse(head_first=head_first)
    sequences = Sequences(initial_state, output_final_state, cu_seqlens, None, reverse)
    return run(q, k, v, sequences, decay=Decay("gk", gk, "channel"), low_rank=(a, b), scale=scale)


def chunk_iplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    head_first: bool | None = None,
) -> Result:
    """Identity plus low rank: `chunk_dplr_delta_rule` of a state that does not fade. chunk_size changes no result."""
    refuse(head_first=head_first)
    sequences = Sequences(initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu)
    return run(q, k, v, sequences, low_rank=(a, b), scale=scale)


def fused_recurrent_iplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """`chunk_iplr_delta_rule` with the arguments of the token-by-token form."""
    return chunk_iplr_delta_rule(q, k, v, a, b, scale, initial_state, output_final_state, cu_seqlens)


def chunk_rwkv7(
    r: Tensor,
    w: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    chunk_size: int | None = None,
    disable_recompute: bool = False,
    cp_context: object | None = None,
    lower_bound: float | None = None,
    *,
    log_w: Tensor | None = None,
    head_first: bool | None = None,
) -> Result:
    """RWKV-7: `chunk_dplr_delta_rule` under its own letters, with scale 1.

    >>> import torch
    >>> r, k, v = (torch.randn(2, 10, 4, 8) for _ in range(3))
    >>> kk = torch.nn.functional.normalize(k, dim=-1)
    >>> w, rate = -0.6 * torch.rand(2, 10, 4, 8), torch.rand(2, 10, 4, 8)
    >>> o, _ = chunk_rwkv7(r, w, k, v, a=-kk, b=kk * rate)
    >>> torch.equal(o, chunk_rwkv7(r, k=k, v=v, a=-kk, b=kk * rate, log_w=w)[0])
    True

    w, or by its older name log_w, is the log-decay [B, T, H, K], at most 0.
    """
    w, k, v, a, b = _given(w=w if log_w is None else _only(w, log_w), k=k, v=v, a=a, b=b)
    refuse(head_first=head_first, cp_context=cp_context)
    sequences = Sequences(initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu)
    return run(r, k, v, sequences, decay=Decay("w", w, "channel"), low_rank=(a, b), scale=scale)


def fused_recurrent_rwkv7(
    r: Tensor,
    w: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    *,
    log_w: Tensor | None = None,
    head_first: bool | None = None,
) -> Result:
    """`chunk_rwkv7` with the arguments and defaults of the token-by-token form: scale K^-0.5, the state returned."""
    w, k, v, a, b = _given(w=w if log_w is None else _only(w, log_w), k=k, v=v, a=a, b=b)
    refuse(head_first=head_first)
    sequences = Sequences(initial_state, output_final_state, cu_seqlens)
    return run(r, k, v, sequences, decay=Decay("w", w, "channel"), low_rank=(a, b), scale=scale)


def fused_mul_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    a: Tensor,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """`chunk_rwkv7` of the removal key kk and its rate a, [B, T, H, K] each: its a is -kk, its b kk * a."""
    sequences = Sequences(initial_state, output_final_state, cu_seqlens, None, reverse)
    return run(r, k, v, sequences, decay=Decay("w", w, "channel"), low_rank=(-kk, kk * a), scale=scale)


def _only(w: Tensor | None, log_w: Tensor) -> Tensor:
    if w is not None:
        raise ValueError("w and log_w are two names of the log-decay; pass one of them")
    return log_w


def _given(**tensors: Tensor | None) -> list[Tensor]:
    """Those that theirs takes without defaults; the older spelling with log_w needs defaults before them."""
    missing = [name for name, x in tensors.items() if x is None]
    if missing:
        raise TypeError(f"missing {', '.join(missing)}: RWKV-7 takes r, w (or log_w), k, v, a and b, [B, T, H, K] each")
    return [x for x in tensors.values() if isinstance(x, torch.Tensor)]
