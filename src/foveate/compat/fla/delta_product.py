"""Gated DeltaProduct: several steps of the delta rule to a token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.compat.fla.gates import unit
from foveate.compat.fla.layout import LAYOUT, Decay, Result, Sequences, refuse, run


def chunk_gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    num_householder: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: object | None = None,
) -> Result:
    """Gated DeltaProduct: the state fades by exp(g_t), then takes num_householder steps of the delta rule.

    >>> q, g = torch.randn(2, 10, 4, 8), -torch.rand(2, 10, 4)
    >>> k, v, beta = torch.randn(2, 20, 4, 8), torch.randn(2, 20, 4, 8), 2 * torch.rand(2, 20, 4)
    >>> chunk_gated_delta_product(q, k, v, g, beta, num_householder=2, use_qk_l2norm_in_kernel=True)[0].shape
    torch.Size([2, 10, 4, 8])

    q is [B, T, H, K] and g (log-decays, at most 0, or None) [B, T, HV]; k [B, T n, H, K], v [B, T n, HV, V] and beta
    (0 to 2) [B, T n, HV] hold the n = num_householder steps of a token one after another, HV a multiple of H.
    cu_seqlens [N + 1] counts tokens, not steps. Any floating dtype, float32 included.
    Raises ValueError where shapes do not fit, NotImplementedError for cp_context.

    Siems et al., DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products, arXiv 2502.10297.
    """
    refuse(cp_context=cp_context)
    _check(q, k, v, g, beta, num_householder)
    if use_qk_l2norm_in_kernel:
        q, k = unit(q), unit(k)
    steps = num_householder
    lengths = Sequences(cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu).lengths(*q.shape[:2])
    offsets = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0) * steps
    every = pad(q.unsqueeze(2), (0, 0, 0, 0, steps - 1, 0)).flatten(1, 2)  # zeros read nothing
    decay = None if g is None else Decay("g", pad(g.unsqueeze(2), (0, 0, 0, steps - 1)).flatten(1, 2), "token")
    sequences = Sequences(initial_state, output_final_state, offsets)
    o, state = run(every, k, v, sequences, decay=decay, beta=beta, scale=scale)
    return o[:, steps - 1 :: steps], state


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, steps: int) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, beta {tuple(beta.shape)}"
    if steps < 1:
        raise ValueError(f"num_householder counts the steps of a token, at least 1; got {steps}")
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"q, k and v must have four dimensions, got {shapes}; {LAYOUT}")
    batch, num_tokens, heads, dim = q.shape
    if tuple(k.shape) != (batch, num_tokens * steps, heads, dim) or v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"k and v must hold {steps} steps to each of the {num_tokens} tokens of q: k [B, T n, H, K], "
            f"v [B, T n, HV, V], got {shapes}; {LAYOUT}"
        )
    if g is not None and tuple(g.shape) != (batch, num_tokens, v.shape[2]):
        raise ValueError(f"g must be [B, T, HV] = {(batch, num_tokens, v.shape[2])}, got {tuple(g.shape)}; {LAYOUT}")
