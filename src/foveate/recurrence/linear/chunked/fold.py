"""Decayed products inside a chunk, by doubling: two neighbouring blocks become one until blocks are chunks.

Only products of factors in [0, 1] are ever formed, never a ratio of two cumulated decays, so decays of any
strength (even exp(decay) = 0, a reset) neither overflow nor lose digits to cancellation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Folded(NamedTuple):
    """With a_t the factor of token t, and i, j running through a chunk of C tokens.

    `factor` is the state's own: the product of all a_t of the chunk.
    """

    products: Tensor  # (B, S, R, chunks, C, C): sum_d x_i y_j prod(a_t, j < t <= i) where j <= i, else 0
    rows: Tensor  # (B, S, R, chunks, C, D): x_i prod(a_t, t <= i), what x_i reads of the state before the chunk
    columns: Tensor  # (B, S, chunks, C, D): y_j prod(a_t, t > j), what of y_j is left after the chunk
    factor: Tensor  # (B, S, chunks, 1, D)


def fold(x: Tensor, y: Tensor, factors: Tensor, *, own: Tensor | None = None) -> Folded:
    """Fold x (B, S, R, chunks, C, D) with y (B, S, chunks, C, D), factors (..., chunks or 1, C, D or 1).

    With ``own`` (B, S, R, chunks, C, 1) x reads what was there *before* its token: the products of factors above
    run over t < i, and the product of x_i with its own y_i is own_i.
    """
    if factors.shape[2:] == y.shape[2:]:
        return _fold_channels(x, y, factors, own)
    ones = torch.ones_like(factors)
    nothing = None if own is None else torch.zeros_like(ones).unsqueeze(2)
    weights = _fold_channels(ones.unsqueeze(2), ones, factors, nothing)
    products = multiply(x, y) * weights.products
    return Folded(
        products=products if own is None else products + torch.diag_embed(own.squeeze(-1)),
        rows=x * weights.rows,
        columns=y * weights.columns,
        factor=weights.factor,
    )


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """All dot products within each block; y is shared by the R heads of x without being repeated."""
    return torch.einsum("bsrpid,bspjd->bsrpij", x, y)


def _fold_channels(x: Tensor, y: Tensor, factors: Tensor, own: Tensor | None) -> Folded:
    chunk = y.size(-2)
    x, y, factor = (t.flatten(-3, -2).unsqueeze(-2) for t in (x, y, factors))  # blocks of one token
    if own is None:
        folded = Folded((x * y.unsqueeze(2)).sum(-1, keepdim=True), x * factor.unsqueeze(2), y, factor)
    else:
        folded = Folded(own.flatten(-3, -2).unsqueeze(-2), x, y, factor)
    while folded.rows.size(-2) < chunk:
        folded = _double(folded)
    return folded


def _double(blocks: Folded) -> Folded:
    (early, late) = zip(*(_neighbours(t) for t in blocks), strict=True)
    first, second = Folded(*early), Folded(*late)
    across = multiply(second.rows, first.columns)
    above = F.pad(first.products, (0, across.size(-1)))
    below = torch.cat((across, second.products), -1)
    return Folded(
        products=torch.cat((above, below), -2),
        rows=torch.cat((first.rows, second.rows * first.factor.unsqueeze(2)), -2),
        columns=torch.cat((first.columns * second.factor, second.columns), -2),
        factor=first.factor * second.factor,
    )


def _neighbours(blocks: Tensor) -> tuple[Tensor, Tensor]:
    first, second = blocks.unflatten(-3, (-1, 2)).unbind(-3)
    return first, second
