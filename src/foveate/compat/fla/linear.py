"""Linear attention, with and without its divisor."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.compat.fla.layout import Sequences, refuse, run
from foveate.precision import accum_dtype

States = Tensor | tuple[Tensor | None, Tensor | None]


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: States | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    *,
    head_first: bool | None = None,
) -> tuple[Tensor, States | None]:
    """Linear attention; ``normalize`` divides by q_t^T z_t, z_t being the sum of the keys so far.

    >>> import torch
    >>> q, k, v = torch.rand(2, 10, 4, 8), torch.rand(2, 10, 4, 8), torch.randn(2, 10, 4, 8)
    >>> o, (state, z) = chunk_linear_attn(q, k, v, output_final_state=True)
    >>> state.shape, z.shape
    (torch.Size([2, 4, 8, 8]), torch.Size([2, 1, 4, 8]))

    With ``normalize`` states are pairs of S [N, H, K, V] and z [N, 1, H, K]; an initial S alone begins with z = 0.

    Katharopoulos et al., Transformers are RNNs, arXiv 2006.16236.
    """
    refuse(head_first=head_first)
    return _linear(q, k, v, scale, initial_state, Sequences(None, output_final_state, cu_seqlens), normalize)


fused_chunk_linear_attn = chunk_linear_attn


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: States | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    head_first: bool | None = None,
) -> tuple[Tensor, States | None]:
    """`chunk_linear_attn` with the arguments and defaults of the token-by-token form."""
    refuse(head_first=head_first)
    sequences = Sequences(None, output_final_state, cu_seqlens, None, reverse)
    return _linear(q, k, v, scale, initial_state, sequences, normalize)


def _linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    initial_state: States | None,
    sequences: Sequences,
    normalize: bool,
) -> tuple[Tensor, States | None]:
    if not normalize:
        if isinstance(initial_state, tuple):
            raise ValueError("a pair of states (S, z) is for normalize=True; pass S alone")
        return run(q, k, v, replace(sequences, initial_state=initial_state), scale=scale)
    beside = pad(v.to(accum_dtype(q, k, v)), (0, 1), value=1.0)  # z becomes one more column of the state
    out, state = run(q, k, beside, replace(sequences, initial_state=_joined(initial_state)), scale=scale)
    out = (out[..., :-1] / (out[..., -1:] + 1e-10)).to(v.dtype)
    return out, None if state is None else (state[..., :-1], state[..., -1].unsqueeze(1))


def _joined(states: States | None) -> Tensor | None:
    """S (N, H, K, V) and z (N, 1, H, K) as one state (N, H, K, V + 1)."""
    kv, z = states if isinstance(states, tuple) else (states, None)
    if kv is None:
        if z is not None:
            raise ValueError("an initial z [N, 1, H, K] without its S [N, H, K, V]: pass both, or neither")
        return None
    if z is None:
        return pad(kv, (0, 1))
    if tuple(z.shape) != (kv.shape[0], 1, *kv.shape[1:3]):
        raise ValueError(f"z must be [N, 1, H, K] beside S {tuple(kv.shape)}, got {tuple(z.shape)}")
    return torch.cat((kv, z.squeeze(1).unsqueeze(-1)), -1)
