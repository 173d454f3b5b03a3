"""What a PyTorch user would call for images: neighborhoods by unfold, FlexAttention or NATTEN; Swin windows by SDPA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.attend_cpu_problem import Attention, Problem
from benchmarks.attend_cpu_rivals import MaskMod, dense_mask
from benchmarks.rivals import Rival, Unfit, needs

CHUNK = 64  # queries whose neighbours fit the cache


def starts(size: int, kernel: int) -> Tensor:
    """First of the ``kernel`` nearest places of each place along an axis."""
    return (torch.arange(size) - kernel // 2).clamp(0, size - kernel)


def neighborhood_mod(dims: Sequence[int], kernel: Sequence[int]) -> MaskMod:
    """The neighborhood as arithmetic on positions."""

    def mask_mod(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = q >= 0
        for size, width in zip(reversed(dims), reversed(kernel), strict=True):
            start = torch.clamp(q % size - width // 2, 0, size - width)
            seen = seen & (k % size >= start) & (k % size < start + width)
            q, k = q // size, k // size
        return seen

    return mask_mod


# ---- neighborhoods ---------------------------------------------------------------------------------------------


def unfold(dims: Sequence[int], kernel: Sequence[int]) -> Rival:
    """Every query's keys and values laid out by ``Tensor.unfold``, then two batched products."""

    def prepare(problem: Problem) -> Attention:
        needs(3.0 * problem.pairs * problem.q.shape[3] * problem.q.element_size())
        return run

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (_unfolded(x, dims, kernel) for x in (k, v))  # (B, H, N, D, K)
        weights = torch.softmax(q.unsqueeze(3) * q.shape[3] ** -0.5 @ keys, -1)
        return (weights @ values.transpose(3, 4)).squeeze(3)

    return Rival("unfold", prepare)


def _unfolded(x: Tensor, dims: Sequence[int], kernel: Sequence[int]) -> Tensor:
    axes = len(dims)
    x = x.unflatten(2, tuple(dims))
    for axis, (size, width) in enumerate(zip(dims, kernel, strict=True), start=2):
        x = x.unfold(axis, width, 1).index_select(axis, starts(size, width))
    return x.flatten(-axes).flatten(2, 1 + axes)


def gather(dims: Sequence[int], kernel: Sequence[int]) -> Rival:
    """The same, few queries at a time, so that what is laid out stays in the cache."""

    def run(neighbours: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(q.split(CHUNK, dim=2), neighbours, strict=True)
        return torch.cat([_gathered(part, k, v, tokens) for part, tokens in parts], dim=2)

    return Rival("unfold, in chunks", lambda problem: partial(run, _neighbours(dims, kernel).split(CHUNK)))


def _gathered(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
    """q (B, H, n, D) over its own keys, tokens (n, K)."""
    keys, values = (x.index_select(2, tokens.flatten()).unflatten(2, tokens.shape) for x in (k, v))
    weights = torch.softmax(q.unsqueeze(3) * q.shape[3] ** -0.5 @ keys.transpose(3, 4), -1)
    return (weights @ values).squeeze(3)


def _neighbours(dims: Sequence[int], kernel: Sequence[int]) -> Tensor:
    """Tokens that each token sees, (N, K)."""
    tokens = torch.zeros(1, 1, dtype=torch.long)
    for size, width in zip(dims, kernel, strict=True):
        along = starts(size, width)[:, None] + torch.arange(width)
        tokens = (tokens[:, None, :, None] * size + along[None, :, None, :]).flatten(2).flatten(0, 1)
    return tokens


def natten(dims: Sequence[int], kernel: Sequence[int]) -> Rival:
    """NATTEN's own call; on a CPU it forms every pair."""

    def prepare(problem: Problem) -> Attention:
        try:
            from natten import functional
        except ImportError:
            raise Unfit("it is not installed (pip install 'foveate[peers]')") from None
        needs(9.0 * math.prod(problem.q.shape[:3]) * problem.k.shape[2] * 4)  # as measured
        return partial(run, getattr(functional, f"na{len(dims)}d"))

    def run(function: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        on_grid = (x.transpose(1, 2).unflatten(1, tuple(dims)) for x in (q, k, v))  # (B, *dims, H, D)
        return function(*on_grid, kernel_size=tuple(kernel)).flatten(1, len(dims)).transpose(1, 2)

    return Rival("NATTEN", prepare)


# ---- Swin windows ----------------------------------------------------------------------------------------------


def _table_index(problem: Problem) -> Tensor:
    """Entry of a head's flattened table for each pair of a window, (L, L)."""
    assert problem.window is not None
    height, width = problem.window
    place = torch.arange(height * width)
    row, column = place // width, place % width
    rows, columns = row[:, None] - row + height - 1, column[:, None] - column + width - 1
    return rows * (2 * width - 1) + columns


def _hidden(problem: Problem) -> Tensor:
    """Swin's shift mask, (W, 1, L, L): 0 where tokens see each other, else -inf."""
    mask = dense_mask(problem)
    assert mask is not None
    return torch.zeros(mask.shape, dtype=problem.q.dtype).masked_fill(~mask, float("-inf"))


def _biased(problem: Problem) -> Attention:
    index, hidden = _table_index(problem), _hidden(problem)
    return lambda q, k, v, table: sdpa(q, k, v, attn_mask=table.flatten(1)[:, index] + hidden)


def _ready(problem: Problem) -> Attention:
    """For inference: bias and mask are added once, outside what is timed."""
    assert problem.table is not None
    mask = problem.table.flatten(1)[:, _table_index(problem)] + _hidden(problem)
    return lambda q, k, v, table: sdpa(q, k, v, attn_mask=mask)


def _swin(problem: Problem) -> Attention:
    index, hidden = _table_index(problem), _hidden(problem)

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        logits = q * problem.scale @ k.transpose(2, 3) + table.flatten(1)[:, index] + hidden
        return torch.softmax(logits, -1) @ v

    return run


SWIN_SDPA = Rival("SDPA, bias added", _biased)
SWIN_SDPA_READY = Rival("SDPA, bias ready", _ready)
SWIN_EAGER = Rival("eager", _swin)
