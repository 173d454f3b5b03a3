"""The gated scan of HGRN. HGRN-2 is `chunk_gla`."""

from __future__ import annotations

from torch import Tensor

from foveate.compat.fla.layout import Result, Sequences
from foveate.precision import accum_dtype
from foveate.recurrence.selective.api import linear_scan


def fused_recurrent_hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """h_t = exp(g_t) h_{t-1} + x_t, channel by channel; o_t is h_t.

    >>> import torch
    >>> x, g = torch.randn(2, 10, 8), -torch.rand(2, 10, 8)
    >>> o, state = fused_recurrent_hgrn(x, g, output_final_state=True)
    >>> torch.equal(o[:, -1], state)
    True

    x and g (log-decays, at most 0) are [B, T, D], the state [N, D]. cu_seqlens [N + 1] are offsets of sequences
    packed in B = 1. Raises ValueError where shapes do not fit.

    Qin et al., Hierarchically Gated Recurrent Neural Network for Sequence Modeling, arXiv 2311.04823.
    """
    if x.dim() != 3 or x.shape != g.shape:
        raise ValueError(f"x and g must be [B, T, D] alike, got {tuple(x.shape)} and {tuple(g.shape)}")
    lengths = Sequences(cu_seqlens=cu_seqlens).lengths(*x.shape[:2])
    state = None if initial_state is None else initial_state.to(accum_dtype(x, g))
    out, state = linear_scan(x, g, state=state, lengths=lengths)
    return out, state if output_final_state else None


def chunk_hgrn(x: Tensor, g: Tensor, initial_state: Tensor | None = None, output_final_state: bool = False) -> Result:
    """`fused_recurrent_hgrn` with the arguments of the chunked form."""
    return fused_recurrent_hgrn(x, g, initial_state, output_final_state)
