"""Windows of grids, cut out and attended at once, against Swin's."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.support.heads import agree, heads, plain
from torch import Tensor

from foveate import Grid, attend, relative_table
from foveate.mixers.exact_io.grid_windows import window_attention, windowed
from foveate.patterns import window_partition


def swin(q: Tensor, k: Tensor, v: Tensor, dims: tuple[int, int], side: int, shift: int, table: Tensor) -> Tensor:
    """Shifted windows as Swin's eager code has them, for a grid of whole windows: roll, cut, mask, join, roll."""
    height, width = dims

    def cut(x: Tensor) -> Tensor:
        image = x.unflatten(2, dims).roll((-shift, -shift), (2, 3))
        windows = image.unflatten(3, (-1, side)).unflatten(2, (-1, side)).transpose(3, 4)
        return windows.flatten(4, 5).flatten(2, 3)  # (B, H, windows, L, D)

    zone = torch.zeros(dims, dtype=torch.long)
    edges = (slice(0, -side), slice(-side, -shift or None), slice(-shift, None))
    if shift:
        for number, (rows, columns) in enumerate(itertools.product(edges, edges)):
            zone[rows, columns] = number
    zone = zone.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2).flatten(2).flatten(0, 1)
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    offset = place.unsqueeze(2) - place.unsqueeze(1) + side - 1
    bias = table[:, offset[0], offset[1]].unsqueeze(1)
    out = plain(cut(q), cut(k), cut(v), zone.unsqueeze(2) == zone.unsqueeze(1), bias)
    out = out.unflatten(3, (side, side)).unflatten(2, (height // side, width // side)).transpose(3, 4)
    return out.flatten(4, 5).flatten(2, 3).roll((shift, shift), (2, 3)).flatten(2, 3)


@pytest.mark.paper("FlashWindowAttention", "definition")
@pytest.mark.parametrize(("dims", "side", "shift"), [((6, 9), 3, 1), ((8, 8), 4, 2), ((4, 6), 2, 0), ((5, 5), 5, 2)])
def test_windows_equal_swin(dims: tuple[int, int], side: int, shift: int) -> None:
    n = math.prod(dims)
    q, k, v = heads(2, 4, n, 8), heads(2, 4, n, 8), heads(2, 4, n, 8)
    table = heads(4, 2 * side - 1, 2 * side - 1)
    expected = swin(q, k, v, dims, side, shift, table)
    agree(windowed(q, k, v, Grid(*dims), side, shift=shift, table=table), expected, q, k, v, table)


@pytest.mark.parametrize(
    ("dims", "window", "shift"),
    [((5, 7), 3, 1), ((7, 8), (2, 5), (0, 4)), ((4, 5, 6), 2, 1), ((11,), 4, 3), ((3, 3), 7, 0)],
)
def test_the_two_forms_of_windows_agree_on_any_grid(
    dims: tuple[int, ...], window: int | tuple[int, ...], shift: int | tuple[int, ...]
) -> None:
    grid, sides = Grid(*dims), window if isinstance(window, tuple) else (window,) * len(dims)
    q, k, v = heads(2, 4, grid.length, 8), heads(2, 2, grid.length, 8), heads(2, 1, grid.length, 8)
    table = heads(4, *(2 * side - 1 for side in sides))
    bias = relative_table(table, grid.dims)
    expected = attend(q, k, v, window_partition(window, shift), bias=bias, layout=grid, impl="reference")
    agree(windowed(q, k, v, grid, window, shift=shift, table=table), expected, q, k, v, table)


def test_window_attention_refuses_labels_of_other_windows() -> None:
    q = torch.randn(6, 2, 9, 8)
    with pytest.raises(ValueError, match="windows"):
        window_attention(q, q, q, labels=torch.zeros(4, 9, dtype=torch.long))
