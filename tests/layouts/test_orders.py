"""Orders: permutations with exact inverses, the paths the papers draw, and scans along several of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate import Grid, Packed, Sequence, scan
from foveate.layouts.orders import (
    Order,
    axes_order,
    bidirectional,
    column_major,
    cross_scan,
    raster,
    reverse,
    scan_orders,
    spatio_temporal,
    windows,
    zigzag,
)

GRIDS = (Grid(1, 1), Grid(1, 7), Grid(5, 1), Grid(4, 6), Grid(7, 5), Grid(2, 3, 4), Grid(3, 1, 5), Grid(3, 5, 2))


def all_orders(grid: Grid) -> list[Order]:
    found = [raster(grid), column_major(grid), *cross_scan(grid), *zigzag(grid), *bidirectional(grid)]
    found += [windows(grid, size, by_column=turn) for size in (1, 2, 3, 9) for turn in (False, True)]
    if grid.num_axes == 3:
        found += spatio_temporal(grid)
    return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_order_is_a_permutation_with_its_inverse(grid: Grid) -> None:
    x = torch.randn(2, grid.length, 3, requires_grad=True)
    for order in all_orders(grid):
        assert sorted(order.index.tolist()) == list(range(grid.length))
        assert torch.equal(order.undo(order.apply(x)), x)
        assert torch.equal(order.apply(order.undo(x)), x)
        assert torch.equal(order.apply(x.mT, dim=2), order.apply(x).mT)
        assert torch.equal(order.apply(x), x[:, order.index])
        (gradient,) = torch.autograd.grad((order.apply(x) * x.detach()).sum(), x)
        assert torch.equal(gradient, order.undo(x))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_consecutive_tokens_of_a_zigzag_are_neighbours(grid: Grid) -> None:
    paths = zigzag(grid)
    assert len(paths) == {2: 8, 3: 48}[grid.num_axes]
    for path in paths:
        at = torch.stack(grid.coordinates(path.index))
        assert bool(((at[:, 1:] - at[:, :-1]).abs().sum(0) == 1).all())
    if min(grid.dims) > 1:
        assert len({tuple(path.index.tolist()) for path in paths}) == len(paths)


def test_zigzags_start_at_every_corner() -> None:
    assert [path.index[0].item() for path in zigzag(Grid(4, 6))] == [0, 5, 18, 23] * 2
    assert {path.index[0].item() for path in zigzag(Grid(2, 3, 4))[:8]} == {0, 3, 8, 11, 12, 15, 20, 23}


def test_paths_are_those_of_the_papers() -> None:
    rows, columns, up, left = (order.index.tolist() for order in cross_scan(Grid(2, 3)))
    assert (rows, columns) == ([0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5])
    assert (up, left) == (rows[::-1], columns[::-1])
    assert len(cross_scan(Grid(2, 3, 4))) == 6
    space, time, *backwards = (order.index.tolist() for order in spatio_temporal(Grid(2, 2, 2)))
    assert (space, time) == (list(range(8)), [0, 4, 1, 5, 2, 6, 3, 7])
    assert backwards == [space[::-1], time[::-1]]
    assert zigzag(Grid(3, 3))[0].index.tolist() == [0, 1, 2, 5, 4, 3, 6, 7, 8]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_windows_are_walked_one_after_another(grid: Grid) -> None:
    sides = tuple(random.randint(1, 4) for _ in grid.dims)
    for by_column in (False, True):
        at = torch.stack(grid.coordinates(windows(grid, sides, by_column=by_column).index))
        window = at // torch.tensor(sides).unsqueeze(1)
        seen = [tuple(each) for each in window.T.tolist()]
        changes = 1 + sum(a != b for a, b in pairwise(seen))
        assert changes == len(set(seen))
    assert windows(grid, max(grid.dims)).index.tolist() == list(range(grid.length))
    assert torch.equal(windows(grid, 1, by_column=True).index, column_major(grid).index)


def test_scans_along_orders_are_added() -> None:
    grid, x = Grid(5, 7), torch.randn(2, 35, 3, dtype=torch.float64)
    paths = cross_scan(grid)
    expected = torch.zeros_like(x)
    for path in paths:
        total = torch.zeros(2, 3, dtype=torch.float64)
        for token in path.index.tolist():
            total = total / 2 + x[:, token]
            expected[:, token] += total

    def fading(tokens: torch.Tensor) -> torch.Tensor:
        age = torch.arange(35)[:, None] - torch.arange(35)
        return (0.5 ** age.double()).tril() @ tokens

    assert_close(scan_orders(fading, x, paths), expected)
    several = scan_orders([fading, *[torch.zeros_like] * 3], x, paths)
    assert_close(several, fading(x))


def test_an_order_is_made_once_a_layout() -> None:
    assert zigzag(Grid(4, 6))[3] is zigzag(Grid(4, 6))[3]
    assert reverse(raster(Grid(4, 6))) is bidirectional(Grid(4, 6))[1]
    x = torch.randn(1, 24, 2)
    assert raster(Grid(4, 6)).apply(x) is x
    assert len(raster(Sequence(9))) == len(raster(Packed([4, 5]))) == 9


def test_orders_are_moved_to_the_device_of_the_tokens() -> None:
    order = reverse(raster(Grid(2, 3)))
    assert order.apply(torch.empty(1, 6, 1, device="meta")).device.type == "meta"
    assert order.undo(torch.empty(1, 6, 1, device="meta")).device.type == "meta"


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="each token once"):
        Order(torch.tensor([0, 2, 2]))
    with pytest.raises(ValueError, match="each of the 2 axes"):
        axes_order(Grid(2, 3), (0, 0))
    with pytest.raises(ValueError, match="time, height, width"):
        spatio_temporal(Grid(2, 3))
    with pytest.raises(ValueError, match="at least 1"):
        windows(Grid(2, 3), (2, 0))
    with pytest.raises(ValueError, match="2 sides"):
        windows(Grid(2, 3), (2, 2, 2))
    with pytest.raises(ValueError, match="number of tokens"):
        raster(Sequence())
    with pytest.raises(ValueError, match="does not fit"):
        scan_orders(torch.sin, torch.ones(1, 5, 1), cross_scan(Grid(2, 3)))
    with pytest.raises(ValueError, match="one for each order; got 2 for 4"):
        scan_orders([torch.sin, torch.cos], torch.ones(1, 6, 1), cross_scan(Grid(2, 3)))


def selective(x: Tensor) -> Tensor:
    """A scan whose steps and gates are the tokens themselves."""
    return scan(x, x.sigmoid(), torch.full((x.shape[2], 2), -1.0), x[..., :2], x[..., 1:3]).out


@pytest.mark.parametrize("paths", [cross_scan, zigzag, bidirectional, lambda grid: [windows(grid, 2)]])
def test_scans_along_orders_compile_to_one_graph(paths: Callable[[Grid], list[Order]]) -> None:
    grid = Grid(5, 7)

    def scanned(x: Tensor) -> Tensor:
        return scan_orders(selective, x, paths(grid))

    x = torch.randn(2, grid.length, 3)
    with torch.no_grad():
        assert_close(torch.compile(scanned, fullgraph=True, backend="aot_eager")(x), scanned(x))


def test_an_order_made_beforehand_compiles() -> None:
    order = Order(torch.randperm(11))
    x = torch.randn(2, 11, 3)

    def scanned(x: Tensor) -> Tensor:
        return scan_orders(selective, x, [order, reverse(order)])

    with torch.no_grad():
        assert_close(torch.compile(scanned, fullgraph=True, backend="aot_eager")(x), scanned(x))
