"""LightNet: linear attention whose keys are a softmax over all tokens so far."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.compat.fla.layout import LAYOUT, Decay, Sequences, run, shared
from foveate.precision import to_accum

States = tuple[Tensor | None, Tensor | None]


def chunk_lightnet(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: States | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor | None, Tensor]]:
    """LightNet: S_t = sum_{j<=t} exp(k_j - z_t) v_j^T, z_t = log sum_{j<=t} exp(k_j), channel by channel of the keys.

    >>> q, k, v = (torch.randn(2, 10, 4, 8) for _ in range(3))
    >>> o, (state, z) = chunk_lightnet(q, k, v, output_final_state=True)
    >>> o.shape, state.shape, z.shape
    (torch.Size([2, 10, 4, 8]), torch.Size([2, 4, 8, 8]), torch.Size([2, 1, 4, 8]))

    q and k (logits) are [B, T, H, K], v [B, T, HV, V], HV a multiple of H; states are pairs of S [N, HV, K, V] and z
    [N, 1, H, K], z returned always, S on demand. The rest is as in `chunk_gla`.

    Qin et al., You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet, arXiv 2405.21022.
    """
    state, z = (None, None) if initial_state is None else initial_state
    sequences = Sequences(state, output_final_state, cu_seqlens, state_v_first=state_v_first)
    key, g, last = _gates(k, z, cu_seqlens)
    heads = v.shape[2] if v.dim() == 4 else 1
    decay = Decay("g", shared(g, heads), "channel") if heads % k.shape[2] == 0 else None
    o, after = run(q, key, v, sequences, decay=decay, scale=scale)
    return o, (after, last)


fused_recurrent_lightnet = chunk_lightnet


def fused_additive_gate(
    x: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
    gate_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """exp(x_t - z_t) and z_{t-1} - z_t (0 for the first token), z_t = log sum_{j<=t} exp(x_j); and the last z.

    >>> key, g, z = fused_additive_gate(torch.zeros(1, 2, 1, 1))
    >>> key.flatten(), g.flatten().exp(), z.shape
    (tensor([1.0000, 0.5000]), tensor([1.0000, 0.5000]), torch.Size([1, 1, 1, 1]))

    x is [B, T, H, K], initial_state and the last z [N, 1, H, K]; the dtypes are x's by default, z's float32 or
    float64. cu_seqlens [N + 1] are offsets of sequences packed in B = 1.
    """
    key, g, last = _gates(x, initial_state, cu_seqlens)
    return key.to(output_dtype or x.dtype), g.to(gate_dtype or x.dtype), last


def _gates(x: Tensor, z: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if x.dim() != 4:
        raise ValueError(f"logits must be [B, T, H, K], got {tuple(x.shape)}; {LAYOUT}")
    lengths = Sequences(cu_seqlens=cu_seqlens).lengths(*x.shape[:2])
    count = x.shape[0] if lengths is None else len(lengths)
    wanted = (count, 1, *x.shape[2:])
    if z is not None and tuple(z.shape) != wanted:
        raise ValueError(f"z must be [N, 1, H, K] = {wanted}, got {tuple(z.shape)}")
    x = to_accum(x)
    z = x.new_full(wanted, -torch.inf) if z is None else z.to(x.dtype)
    pieces = [x] if lengths is None else x.split(lengths, 1)
    starts = [z] if lengths is None else z.split(1)
    sums = [_log_sums(piece, start) for piece, start in zip(pieces, starts, strict=True)]
    before, after = (torch.cat(part, 1) for part in zip(*((s[:, :-1], s[:, 1:]) for s in sums), strict=True))
    fades = torch.where(before.isneginf(), 0, before - after)
    fades = fades - fades.detach().clamp(min=0)  # a rounding above 0 is cut off, its gradient is not
    return (x - after).exp(), fades, torch.cat([s[:, -1:] for s in sums])


def _log_sums(x: Tensor, start: Tensor) -> Tensor:
    """z before and after each token, [B, T + 1, H, K]."""
    return torch.cat([start, x], 1).logcumsumexp(1)
