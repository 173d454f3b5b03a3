"""Additive states whose heads fade by constants: retention and lightning attention."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.compat.fla.layout import LAYOUT, Decay, Result, Sequences, refuse, run, v_first
from foveate.precision import accum_dtype


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    head_first: bool | None = None,
) -> Result:
    """Retention: head h fades by 1 - 2^(-5 - h) a token.

    >>> import torch
    >>> q, k, v = (torch.randn(2, 10, 4, 8) for _ in range(3))
    >>> o, state = chunk_retention(q, k, v, output_final_state=True)
    >>> o.shape, state.shape
    (torch.Size([2, 10, 4, 8]), torch.Size([2, 4, 8, 8]))

    Shapes, dtypes and errors are those of `chunk_gla`. chunk_size is accepted and changes no result.

    Sun et al., Retentive Network: A Successor to Transformer for Large Language Models, arXiv 2307.08621.
    """
    refuse(head_first=head_first)
    sequences = Sequences(initial_state, output_final_state, cu_seqlens)
    return run(q, k, v, sequences, decay=_retention(q, k, v), scale=scale)


def fused_chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """`chunk_retention` with the arguments of the fused form."""
    return chunk_retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens)


def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
) -> Result:
    """`chunk_retention` with the arguments of the token-by-token form."""
    first = v_first(state_v_first, transpose_state_layout)
    sequences = Sequences(initial_state, output_final_state, cu_seqlens, None, reverse, first)
    return run(q, k, v, sequences, decay=_retention(q, k, v), scale=scale)


def parallel_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """`chunk_retention` with the arguments of the parallel form; (o, None), without weights."""
    refuse(output_attentions=output_attentions)
    return chunk_retention(q, k, v, scale, cu_seqlens=cu_seqlens)


def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    head_first: bool | None = None,
) -> Result:
    """Lightning attention: head h fades by exp(-8 h / H (1 - layer_idx / num_layers)) a token.

    >>> import torch
    >>> q, k, v = (torch.randn(2, 10, 4, 8) for _ in range(3))
    >>> chunk_lightning_attn(q, k, v, layer_idx=3, num_layers=12)[0].shape
    torch.Size([2, 10, 4, 8])

    Shapes, dtypes and errors are those of `chunk_gla`. chunk_size is accepted and changes no result.

    Qin et al., Lightning Attention-2, arXiv 2401.04658.
    """
    refuse(head_first=head_first)
    sequences = Sequences(initial_state, output_final_state, cu_seqlens)
    return run(q, k, v, sequences, decay=_lightning(q, k, v, layer_idx, num_layers), scale=scale)


def fused_recurrent_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """`chunk_lightning_attn` with the arguments of the token-by-token form."""
    sequences = Sequences(initial_state, output_final_state, cu_seqlens, None, reverse)
    return run(q, k, v, sequences, decay=_lightning(q, k, v, layer_idx, num_layers), scale=scale)


def _retention(q: Tensor, k: Tensor, v: Tensor) -> Decay:
    return Decay("g_gamma", torch.log1p(-(2.0 ** (-5.0 - _heads(q, k, v)))), "head")


def _lightning(q: Tensor, k: Tensor, v: Tensor, layer: int, num_layers: int) -> Decay:
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer_idx counts from 0 to num_layers - 1 = {num_layers - 1}, got {layer}")
    return Decay("g_gamma", -8 / v.shape[2] * (1 - layer / num_layers) * _heads(q, k, v), "head")


def _heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The numbers of the heads in the dtype of the arithmetic."""
    if v.dim() != 4 or v.shape[2] == 0:
        raise ValueError(f"v must be [B, T, HV, V] with at least one head, got {tuple(v.shape)}; {LAYOUT}")
    return torch.arange(v.shape[2], dtype=accum_dtype(q, k, v), device=v.device)
