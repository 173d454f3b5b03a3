"""The delta rule inside a chunk, as one triangular solve (the WY / UT transform of DeltaNet, 2406.06484).

With u_i = beta_i (v_i - k_i^T S'_i) the delta rule is the additive one with values u. Inside a chunk that the
state S enters, u depends on S linearly: (I + diag(beta) K) u = diag(beta) (v - rows S), where K holds the
decayed products of keys below the diagonal and rows the keys decayed since the chunk began.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.recurrence.linear.chunked.fold import Folded, fold
from foveate.recurrence.linear.inputs import Grouped


class Corrected(NamedTuple):
    """Affine maps of the state S entering a chunk: u = values - reads S, S_next = update + transition S."""

    values: Tensor  # (B, S, chunks, C, Dv)
    reads: Tensor  # (B, S, chunks, C, D)
    update: Tensor  # (B, S, chunks, D, Dv)
    transition: Tensor  # (B, S, chunks, D, D)


def correct(inputs: Grouped) -> tuple[Folded, Corrected]:
    """Solve for the values the delta rule really writes; the Folded is that of the queries."""
    q, k, v, decay, beta, *_ = inputs
    assert beta is not None
    both = fold(torch.cat((q, k.unsqueeze(2)), 2), k, decay.exp())
    (q_products, k_products), (q_rows, k_rows) = ((x[:, :, :-1], x[:, :, -1]) for x in (both.products, both.rows))
    solved = torch.linalg.solve_triangular(  # reads nothing on or above the diagonal
        beta * k_products, beta * torch.cat((v, k_rows), -1), upper=False, unitriangular=True
    )
    values, reads = solved.split((v.size(-1), k.size(-1)), -1)
    corrected = Corrected(
        values=values,
        reads=reads,
        update=both.columns.mT @ values,
        transition=_diagonal(both.factor, k) - both.columns.mT @ reads,
    )
    return Folded(q_products, q_rows, both.columns, both.factor), corrected


def _diagonal(factor: Tensor, k: Tensor) -> Tensor:
    """factor (..., 1, D or 1) as diagonal matrices (..., D, D)."""
    return factor * torch.eye(k.size(-1), dtype=k.dtype, device=k.device)
