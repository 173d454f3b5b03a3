"""Linear attention by polynomials of the scores: Based (1 + s + s^2 / 2) and ReBased (s^2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.compat.fla.layout import Sequences, check_layout, run, shared
from foveate.precision import to_accum
from foveate.recurrence.linear.polynomial import polynomial_features

Coefficients = tuple[float, float, float]  # of 1, s and s^2

BASED: Coefficients = (1, 1, 0.5)
REBASED: Coefficients = (0, 0, 1)


def parallel_based(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, use_norm: bool = True) -> Tensor:
    """Based: causal attention by weights 1 + s + s^2 / 2, s = scale q k, divided by their sum with ``use_norm``.

    >>> q, k, v = torch.randn(2, 10, 4, 16), torch.randn(2, 10, 4, 16), torch.randn(2, 10, 4, 8)
    >>> parallel_based(q, k, v).shape
    torch.Size([2, 10, 4, 8])

    q and k are [B, T, H, K], v [B, T, H, V], of any floating dtype; computed in float32 or float64. The time is linear
    in T where there are more tokens than features, 1 + K + K (K + 1) / 2. Raises ValueError where shapes do not fit.

    Arora et al., Simple Linear Attention Language Models Balance the Recall-Throughput Tradeoff, arXiv 2402.18668.
    """
    out, total = _sums(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, BASED)
    return (out / (total + 1e-6) if use_norm else out).to(q.dtype)


fused_chunk_based = parallel_based


def parallel_rebased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eps: float = 1e-5,
    use_scale: bool = True,
    use_normalize: bool = True,
    return_both: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """ReBased: causal attention by weights (q k)^2 / K, divided by their sum (plus eps) with ``use_normalize``.

    >>> q, k, v = torch.randn(2, 10, 4, 16), torch.randn(2, 10, 4, 16), torch.randn(2, 10, 4, 8)
    >>> o, z = parallel_rebased(q, k, v, return_both=True)
    >>> o.shape, z.shape
    (torch.Size([2, 4, 10, 8]), torch.Size([2, 4, 10]))

    use_scale=False leaves out the 1 / K. return_both gives the weighed values and the sums of weights apart, heads
    first there as here. The rest is as in `parallel_based`.

    Aksenov et al., Linear Transformers with Learnable Kernel Functions are Better In-Context Models, arXiv 2402.10644.
    """
    out, total = _sums(q, k, v, q.shape[-1] ** -0.5 if use_scale else 1.0, REBASED)
    if return_both:
        return out.transpose(1, 2).to(q.dtype), total.squeeze(-1).transpose(1, 2).to(q.dtype)
    return (out / (total + eps) if use_normalize else out).to(q.dtype)


def _sums(q: Tensor, k: Tensor, v: Tensor, scale: float, weights: Coefficients) -> tuple[Tensor, Tensor]:
    """Values summed by their weights [B, T, H, V], and the weights' own sums [B, T, H, 1], in float32 or float64."""
    check_layout(q, k, v, None)
    q, k, v = to_accum(q) * scale, to_accum(k), pad(to_accum(v), (0, 1), value=1.0)  # a column of ones sums the weights
    dim = q.shape[-1]
    linear = q.shape[1] > 1 + dim + dim * (dim + 1) // 2
    out = _by_features(q, k, v, weights) if linear else _by_pairs(q, k, v, weights)
    return out[..., :-1], out[..., -1:]


def _by_features(q: Tensor, k: Tensor, v: Tensor, weights: Coefficients) -> Tensor:
    q, k = (polynomial_features(x, *weights) for x in (q, k))
    return run(q, k, v, Sequences(), scale=1.0)[0]


def _by_pairs(q: Tensor, k: Tensor, v: Tensor, weights: Coefficients) -> Tensor:
    heads = v.shape[2]
    scores = torch.einsum("bihd,bjhd->bhij", shared(q, heads), shared(k, heads))
    constant, linear, square = weights
    return torch.einsum("bhij,bjhd->bihd", (constant + linear * scores + square * scores.square()).tril(), v)
