"""Features whose products are polynomials of the inner product: linear attention by powers of its scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def polynomial_features(x: Tensor, constant: float, linear: float, square: float) -> Tensor:
    """Features of x (..., D) whose products are constant + linear s + square s^2, s = x^T y; coefficients at least 0.

    Products x_i x_j and x_j x_i are one feature, and a coefficient of 0 makes none: up to 1 + D + D (D + 1) / 2.

    >>> x, y = torch.randn(2, 5, 8, dtype=torch.float64).unbind(0)
    >>> s = (x * y).sum(-1)
    >>> products = (polynomial_features(x, 2, 3, 4) * polynomial_features(y, 2, 3, 4)).sum(-1)
    >>> torch.allclose(products, 2 + 3 * s + 4 * s**2)
    True
    """
    first, second = torch.triu_indices(x.shape[-1], x.shape[-1], 1, device=x.device)
    crossed = x[..., first] * x[..., second]
    parts = [
        (constant, torch.ones_like(x[..., :1])),
        (linear, x),
        (square, x.square()),
        (2 * square, crossed),
    ]
    return torch.cat([math.sqrt(factor) * part if factor != 1 else part for factor, part in parts if factor], dim=-1)
