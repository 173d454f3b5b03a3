"""How dynamic patterns choose: scores of blocks or keys, and the best or the fewest of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

SCORES = 2**20  # scores held at a time, unless 64 rows hold more
ROWS = 64
FEW = 16  # shares that often suffice, found faster than all are sorted

NEVER = float("-inf")  # score of what may not be chosen


def slices(num_rows: int, scores_per_row: int) -> Iterator[slice]:
    """Consecutive rows whose scores fit in the cache: one slice or more, all but the last of 64 n rows."""
    step = max(SCORES // max(scores_per_row, 1) // ROWS, 1) * ROWS
    for first in range(0, max(num_rows, 1), step):
        yield slice(first, min(first + step, num_rows))


def widen(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pool(x: Tensor, block: int, *, lead: int = 0) -> Tensor:
    """Means of blocks of tokens, (B, H, ceil((lead + N) / block), D); the first lacks ``lead`` tokens."""
    length = x.shape[2]
    edges = (lead, -(lead + length) % block)
    sums = pad(widen(x), (0, 0, *edges)).unflatten(2, (-1, block)).sum(3)
    counts = pad(x.new_ones(length, dtype=sums.dtype), edges).unflatten(0, (-1, block)).sum(1)
    return sums / counts.unsqueeze(1)


def score(rows: Tensor, keys: Tensor) -> Tensor:
    """Products of rows (B, H, n, D) with the keys (B, G, C, D) of their group, (B, H, n, C)."""
    group = rows.shape[1] // keys.shape[1]
    by_group = rows.to(keys.dtype).unflatten(1, (-1, group)).flatten(2, 3)  # (B, G, H / G * n, D)
    return (by_group @ keys.transpose(2, 3)).unflatten(2, (group, -1)).flatten(1, 2)


def shares(scores: Tensor) -> Tensor:
    """Softmax over what may be chosen; what may not stays that, also in a row where nothing may."""
    return torch.where(scores > NEVER, torch.softmax(scores, -1), NEVER)


def best(scores: Tensor, count: int) -> Tensor:
    """True at the ``count`` greatest scores of each row; of equal ones the first."""
    if count >= scores.shape[-1]:
        return scores > NEVER
    values, order = scores.topk(count + 1)
    chosen = _marked(scores, order[..., :count]) & (scores > NEVER)
    least, next_best = values[..., max(count - 1, 0)], values[..., count]
    tied = (least == next_best) & (next_best > NEVER)
    if count and bool(tied.any()):
        order = torch.sort(scores[tied], dim=-1, descending=True, stable=True).indices
        chosen[tied] = _marked(scores[tied], order[..., :count])
    return chosen


def fewest(share: Tensor, mass: float) -> Tensor:
    """True at the fewest shares of each row that add up to ``mass``; of equal ones the first."""
    if mass >= 1 or share.shape[-1] == 0:
        return share > NEVER
    if share.shape[-1] <= 2 * FEW:
        return _fewest_sorted(share, mass)
    values, order = share.topk(FEW)
    values = values.clamp_min(0)
    needed = values.cumsum(-1) - values < mass
    chosen = torch.zeros_like(share, dtype=torch.bool).scatter_(-1, order, needed) & (share > NEVER)
    last = values.gather(-1, needed.sum(-1, keepdim=True) - 1)
    open_rows = needed[..., -1] | ((share >= last).sum(-1) > needed.sum(-1))  # not enough, or equal at the end
    if bool(open_rows.any()):
        chosen[open_rows] = _fewest_sorted(share[open_rows], mass)
    return chosen


def _fewest_sorted(share: Tensor, mass: float) -> Tensor:
    ordered, order = torch.sort(share, dim=-1, descending=True, stable=True)
    ordered = ordered.clamp_min(0)
    needed = ordered.cumsum(-1) - ordered < mass
    return torch.zeros_like(share, dtype=torch.bool).scatter_(-1, order, needed) & (share > NEVER)


def along_diagonals(weights: Tensor) -> Tensor:
    """Sums (B, H, M) at each distance of the causal weights (B, H, L, M) of the last L queries.

    Counted from the far corner, row i meets distance d at column d + i: in rows of one column more, all of a
    distance stand above one another.
    """
    length, num_keys = weights.shape[2:]
    flat = pad(weights.flip(2, 3), (0, length)).flatten(2)
    skewed = pad(flat, (0, length)).unflatten(2, (length, num_keys + length + 1))
    return skewed[..., :num_keys].sum(2)


def _marked(scores: Tensor, order: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
