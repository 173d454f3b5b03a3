"""A state that fades and is turned besides, S_t = (Diag(f_t) + b_t a_t^T) S_{t-1} + k_t v_t^T, inside a chunk.

With r_i = a_i^T S_{i-1} it is the additive rule with two writes a token, k_i v_i^T and b_i r_i^T, and inside a chunk
that the state S enters, r is the solution of a triangular system: (I - A_b) r = A_k v + rows S, where A_b and A_k hold
the decayed products of a with b and k strictly below the diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.recurrence.linear.chunked.fold import Folded, fold
from foveate.recurrence.linear.inputs import Grouped


def recur_low_rank(inputs: Grouped, reads: Folded, state: Tensor) -> tuple[Tensor, Tensor]:
    """Out (B, S, R, chunks, C, Dv) and the next state, from inputs cut into chunks and the folded queries and keys."""
    assert inputs.low_rank is not None
    a, b = inputs.low_rank
    factors, v = inputs.decay.exp(), inputs.v
    nothing = torch.zeros_like(a[..., :1]).unsqueeze(2)
    of_b = fold(a.unsqueeze(2), b, factors, own=nothing)
    of_k = fold(a.unsqueeze(2), inputs.k, factors, own=nothing)
    queries = fold(inputs.q, b, factors, own=_own(inputs, b))
    known = torch.cat((of_k.products[:, :, 0] @ v, of_k.rows[:, :, 0]), -1)
    solved = torch.linalg.solve_triangular(-of_b.products[:, :, 0], known, upper=False, unitriangular=True)
    values, rows = solved.split((v.size(-1), a.size(-1)), -1)  # r = values + rows S
    outs = []
    for c in range(v.size(2)):
        r = values[:, :, c] + rows[:, :, c] @ state
        written = torch.einsum("bsrij,bsjv->bsriv", reads.products[:, :, :, c], v[:, :, c])
        turned = torch.einsum("bsrij,bsjv->bsriv", queries.products[:, :, :, c], r)
        outs.append(written + turned + torch.einsum("bsrid,bsdv->bsriv", reads.rows[:, :, :, c], state))
        faded = reads.factor[:, :, c if reads.factor.size(2) > 1 else 0].mT * state
        state = faded + reads.columns[:, :, c].mT @ v[:, :, c] + of_b.columns[:, :, c].mT @ r
    return torch.stack(outs, 3), state


def _own(inputs: Grouped, b: Tensor) -> Tensor | None:
    """Queries with a bonus read the state before the token: nothing of its own b."""
    return None if inputs.bonus is None else torch.zeros_like(inputs.q[..., :1])
