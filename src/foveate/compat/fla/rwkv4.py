"""RWKV-4's averages."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.mixers.recurrent_ssm.rwkv4 import Averages, weighed_average
from foveate.precision import accum_dtype, to_accum
from foveate.recurrence.linear.stabilise import NOTHING


def fused_recurrent_rwkv4(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """RWKV-4's wkv: averages of past values by weights exp(k_i), fading by exp(-exp(w)) a token, u for the present.

    >>> k, v, state = torch.randn(2, 10, 6), torch.randn(2, 10, 6), torch.zeros(2, 3, 1, 6)
    >>> wkv, state = fused_recurrent_rwkv4(torch.zeros(6), torch.zeros(6), k, v, state)
    >>> wkv.shape, state.shape
    (torch.Size([2, 10, 6]), torch.Size([2, 3, 1, 6]))

    k and v are [B, T, C], w and u [C], the state [B, 3, 1, C]: sums of weighed values and of weights, in units of the
    exponential of the third, which carries no gradient in the state returned (any unit says the same). Any floating
    dtype; the state comes in float32 or float64. Raises ValueError where shapes do not fit.

    Peng et al., RWKV: Reinventing RNNs for the Transformer Era, arXiv 2305.13048.
    """
    if k.dim() != 3 or k.shape != v.shape or {tuple(w.shape), tuple(u.shape)} != {tuple(k.shape[2:])}:
        raise ValueError(
            f"k and v must be [B, T, C] alike, w and u [C], got {tuple(k.shape)}, {tuple(v.shape)}, {tuple(w.shape)} "
            f"and {tuple(u.shape)}"
        )
    if tuple(state.shape) != (k.shape[0], 3, 1, k.shape[2]):
        raise ValueError(f"state must be [B, 3, 1, C] = {(k.shape[0], 3, 1, k.shape[2])}, got {tuple(state.shape)}")
    dtype = accum_dtype(w, u, k, v, state)
    sums, weights, unit = (part.squeeze(1) for part in state.to(dtype).unbind(1))
    unit = unit.clamp(min=NOTHING)
    held = (unit - unit.detach()).exp()  # 1, with the gradient that the unit is not given further down
    averages = Averages(torch.cat([sums * held, weights * held], -1), unit.detach())
    wkv, after = weighed_average(k.to(dtype), v.to(dtype), -to_accum(w).exp().to(dtype), u.to(dtype), averages)
    last = torch.stack([*after.sums.chunk(2, -1), after.unit], 1).unsqueeze(2)
    return wkv.to(k.dtype), last
