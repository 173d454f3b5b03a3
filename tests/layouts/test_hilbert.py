"""The generalised Hilbert curve: every token once, each beside the last, and near in space where near in order."""

from __future__ import annotations

import itertools

import pytest
import torch

from foveate import Grid
from foveate.layouts.hilbert import hilbert


@pytest.mark.parametrize("dims", [*itertools.product((1, 2, 3, 6, 7), repeat=3), (9,), (5, 8), (13, 30, 45)])
def test_each_token_is_beside_the_last(dims: tuple[int, ...]) -> None:
    """`Order` refuses what is no permutation; steps across a corner are few."""
    grid = Grid(*dims)
    cells = torch.stack(grid.coordinates(hilbert(grid).index), 1)
    steps = (cells[1:] - cells[:-1]).abs()
    assert steps.numel() == 0 or int(steps.max()) == 1
    across = int((steps.sum(1) > 1).sum())
    assert across <= 1 + len(steps) // 20
    if all(size % 2 == 0 for size in dims):
        assert across == 0


def test_runs_of_the_curve_are_lumps() -> None:
    """Of 64 tokens of a run the spread along each axis is far below that of rows."""
    grid = Grid(8, 16, 16)

    def spread(index: torch.Tensor) -> float:
        cells = torch.stack(grid.coordinates(index), 1).view(-1, 64, 3)
        return float((cells.amax(1) - cells.amin(1) + 1).prod(1).double().mean())

    assert spread(hilbert(grid).index) < 160
    assert hilbert(Grid(2, 2)).index.tolist() == [0, 1, 3, 2]
