"""Based's linear attention, by the Taylor series of the exponential."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from foveate.catalogue.registry import register
from foveate.mixers.base import divided
from foveate.mixers.linear.linear_transformer import LinearTransformer
from foveate.mixers.recurrent import RecurOptions
from foveate.recurrence.linear.polynomial import polynomial_features


def taylor(x: Tensor) -> Tensor:
    """Features (..., 1 + D + D (D + 1) / 2) of x (..., D) whose products are 1 + s + s^2 / 2, s = x^T y / sqrt(D).

    That is exp(s) to second order, never below 1/2. Products x_i x_j and x_j x_i are one feature.

    >>> import torch
    >>> x, y = torch.randn(2, 5, 8, dtype=torch.float64).unbind(0)
    >>> s = (x * y).sum(-1) / 8**0.5
    >>> torch.allclose((taylor(x) * taylor(y)).sum(-1), 1 + s + s**2 / 2)
    True
    """
    return polynomial_features(x * x.shape[-1] ** -0.25, 1, 1, 0.5)


def few_keys(dim: int, heads: int, head_dim: int | None, value_dim: int | None) -> tuple[int, int]:
    """Widths of a head's keys and values where they are not given: 16 and dim / heads."""
    return head_dim or 16, value_dim or divided(dim, heads)


@register(
    "based_linear",
    papers=("BASED",),
    formula="o_i = Σ_j (1 + s_ij + s_ij^2 / 2) v_j / Σ_j (1 + s_ij + s_ij^2 / 2), s_ij = q_iᵀ k_j / √D",
    notes="The linear half of BASED, whose models interleave it with softmax attention in small windows.",
)
class BasedLinear(LinearTransformer):
    """Linear attention with the second-order Taylor series of softmax's exponential.

    ``head_dim`` is small, 16 as in the paper, because there are about head_dim^2 / 2 features; ``value_dim`` is
    dim / heads.
    """

    widths = few_keys

    def __init__(self, dim: int, heads: int = 8, **options: Unpack[RecurOptions]) -> None:
        super().__init__(dim, heads, feature_map=taylor, **options)
