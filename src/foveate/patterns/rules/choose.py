"""How dynamic patterns choose: scores of blocks or keys, and the best or the fewest of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.patterns.rules.decided import pack_rows, rows_per_word
from foveate.patterns.select import native
from foveate.precision import to_accum

SCORES = 2**20  # scores held at a time, unless 64 rows hold more
ROWS = 64
WIDENED = 2**18  # numbers widened at a time: in memory that is used over again, four times faster than all at once
FEW = 16  # shares that often suffice, found faster than all are sorted
WHOLE = 2**30  # what the shares of a row add up to, as whole numbers: sums of them are exact in any order

NEVER = float("-inf")  # score of what may not be chosen


def slices(num_rows: int, scores_per_row: int) -> Iterator[slice]:
    """Consecutive rows whose scores fit in the cache: one slice or more, all but the last of 64 n rows."""
    step = max(SCORES // max(scores_per_row, 1) // ROWS, 1) * ROWS
    for first in range(0, max(num_rows, 1), step):
        yield slice(first, min(first + step, num_rows))


def pool(x: Tensor, block: int, *, lead: int = 0) -> Tensor:
    """Means of blocks of tokens, (B, H, ceil((lead + N) / block), D); the first lacks ``lead`` tokens."""
    pooled = native.pool(x, block, lead)
    if pooled is not None:
        return pooled
    first = min(-lead % block, x.shape[2])
    num_whole = (x.shape[2] - first) // block
    end = first + num_whole * block
    parts = [x[:, :, :first].unsqueeze(2)] if first else []
    parts += _pieces(x[:, :, first:end].unflatten(2, (num_whole, block)))
    parts += [x[:, :, end:].unsqueeze(2)] if end < x.shape[2] else []
    return torch.cat([to_accum(part).mean(3) for part in parts], 2)


def _pieces(blocks: Tensor) -> Iterable[Tensor]:
    """Blocks (B, H, K, block, D) some at a time where their numbers are yet to be widened."""
    if to_accum(blocks[:0]).dtype == blocks.dtype:
        return [blocks]
    return blocks.split(max(WIDENED // max(blocks[:, :, :1].numel(), 1), 1), 2)


def score(rows: Tensor, keys: Tensor) -> Tensor:
    """Products of rows (B, H, n, D) with the keys (B, G, C, D) of their group, (B, H, n, C)."""
    group = rows.shape[1] // keys.shape[1]
    by_group = rows.to(keys.dtype).unflatten(1, (-1, group)).flatten(2, 3)  # (B, G, H / G * n, D)
    return (by_group @ keys.transpose(2, 3)).unflatten(2, (group, -1)).flatten(1, 2)


def shares(scores: Tensor) -> Tensor:
    """Softmax over what may be chosen; what may not stays that, also in a row where nothing may."""
    return torch.where(scores > NEVER, torch.softmax(scores, -1), NEVER)


class Sought(NamedTuple):
    """How many of the best scores, or the fewest shares that add up to how much."""

    number: float
    by_share: bool = False

    def marks(self, weights: Tensor) -> Tensor:
        """True at what each row of scores or shares takes."""
        return fewest(weights, self.number) if self.by_share else best(weights, int(self.number))

    @property
    def budget(self) -> int:
        """The number as the native kernels take it: of scores, or of steps of a share."""
        if not self.by_share:
            return int(self.number)
        return math.ceil(self.number * WHOLE) if self.number < 1 else 2**62


def choose_rows(weights: Tensor, sought: Sought, out: Tensor, q_block: int, *, own: Tensor | None = None) -> None:
    """Write the blocks that rows of scores or shares (B, H, n, C) take, as words (B, H, w, K >= C), into zeros.

    A row is ``q_block`` queries (see :func:`foveate.patterns.rules.decided.pack_rows`). With ``own`` (n,) row r takes
    block ``own[r]`` besides, and only blocks before that one compete.
    """
    if native.choose_rows(weights, sought.budget, sought.by_share, out, rows_per_word(q_block), own):
        return
    marks = sought.marks(weights if own is None else before(own, weights))
    if own is not None:
        marks |= torch.arange(weights.shape[3], device=weights.device) == own.unsqueeze(1)
    out[..., : weights.shape[3]] = pack_rows(marks, q_block)


def before(own: Tensor, weights: Tensor) -> Tensor:
    """The weights (..., n, C), overwritten by ``NEVER`` from column ``own[r]`` of row r on."""
    columns = torch.arange(weights.shape[-1], device=weights.device)
    return weights.masked_fill_(columns >= own.unsqueeze(1), NEVER)


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
    """True at the fewest shares of each row that add up to ``mass``; of equal ones the first.

    Shares are taken in steps of 2**-30 of the whole.
    """
    if mass >= 1 or share.shape[-1] == 0:
        return share > NEVER
    whole = (share.clamp_min(0) * WHOLE).round()
    wanted = math.ceil(mass * WHOLE)
    if share.shape[-1] <= 2 * FEW:
        return _fewest_sorted(whole, wanted) & (share > NEVER)
    values, order = whole.topk(FEW)
    needed = _before(values) < wanted
    chosen = torch.zeros_like(share, dtype=torch.bool).scatter_(-1, order, needed)
    last = values.gather(-1, needed.sum(-1, keepdim=True) - 1)
    open_rows = needed[..., -1] | ((whole >= last).sum(-1) > needed.sum(-1))  # not enough, or equal at the end
    if bool(open_rows.any()):
        chosen[open_rows] = _fewest_sorted(whole[open_rows], wanted)
    return chosen & (share > NEVER)


def _fewest_sorted(whole: Tensor, wanted: int) -> Tensor:
    ordered, order = torch.sort(whole, dim=-1, descending=True, stable=True)
    return torch.zeros_like(whole, dtype=torch.bool).scatter_(-1, order, _before(ordered) < wanted)


def _before(ordered: Tensor) -> Tensor:
    """Sum of the shares before each."""
    ordered = ordered.long()
    return ordered.cumsum(-1) - ordered


def looked_back(rows: Tensor, keys: Tensor, reach: int | None = None) -> tuple[Tensor, Tensor]:
    """Causal softmax weights of the last queries (B, H, L, D), summed by key and by distance, (B, H, M) each.

    No key further back than ``reach`` is looked at.
    """
    shape = (*rows.shape[:2], keys.shape[2])
    if rows.numel() == 0:
        return rows.new_zeros(shape), rows.new_zeros(shape)
    group = rows.shape[1] // keys.shape[1]
    by_key, by_distance = [], []
    for heads, head in zip(rows.flatten(0, 1).split(group), keys.flatten(0, 1), strict=True):
        weights = _causal_weights(heads, to_accum(head), reach)
        by_key.append(weights.sum(1))
        by_distance.append(_along_diagonals(weights))
    return torch.cat(by_key).view(shape), torch.cat(by_distance).view(shape)


def _causal_weights(rows: Tensor, keys: Tensor, reach: int | None) -> Tensor:
    """Of the last L queries (h, L, D), (h, L, M)."""
    scores = rows.to(keys.dtype) @ keys.T
    length = rows.shape[1]
    ahead = torch.ones(length, length, dtype=torch.bool, device=rows.device).triu(1)
    scores[..., scores.shape[2] - length :].masked_fill_(ahead, NEVER)
    if reach is not None:
        place = torch.arange(scores.shape[2] - length, scores.shape[2], device=rows.device).unsqueeze(1)
        scores.masked_fill_(torch.arange(scores.shape[2], device=rows.device) < place - reach, NEVER)
    return torch.softmax(scores, -1)


def _along_diagonals(weights: Tensor) -> Tensor:
    """Sums (h, M) at each distance of the causal weights (h, L, M) of the last L queries.

    Behind L - 1 zeros in each row, all of a distance stand one column further right from row to row.
    """
    heads, length, num_keys = weights.shape
    shifted = pad(weights, (length - 1, 0))
    width = shifted.shape[2]
    return shifted.as_strided((heads, length, num_keys), (length * width, width + 1, 1)).sum(1).flip(1)


def _marked(scores: Tensor, order: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
