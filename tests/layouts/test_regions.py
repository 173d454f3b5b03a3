"""Regions of a grid: which tokens, where, and their means."""

from __future__ import annotations

import pytest
import torch
from tests.support.on_grids import boxes

from foveate import Grid
from foveate.layouts.regions import regions_of


@pytest.mark.parametrize(
    ("dims", "sides"), [((7,), (3,)), ((5, 7), (2, 3)), ((4, 6), (2, 3)), ((3, 5, 4), (2, 2, 9)), ((2, 2), (5, 5))]
)
def test_regions_are_boxes_cut_at_the_border(dims: tuple[int, ...], sides: tuple[int, ...]) -> None:
    grid, regions, cut = Grid(*dims), regions_of(Grid(*dims), sides), boxes(dims, sides)
    assert [sorted(row[row >= 0].tolist()) for row in regions.slots] == cut
    assert regions.tokens.tolist() == [len(tokens) for tokens in cut]
    assert [int(regions.region_of[tokens].unique()) for tokens in cut] == list(range(len(cut)))
    assert regions.count == len(cut) == torch.tensor(regions.dims).prod()
    x = torch.randn(2, 3, grid.length, 4, dtype=torch.float64)
    split = regions.split(x)
    torch.testing.assert_close(regions.join(split), x)
    torch.testing.assert_close(regions.means(split), torch.stack([x[:, :, tokens].mean(2) for tokens in cut], 2))
    assert not split[:, :, ~regions.holds].any()


def test_sides_that_do_not_fit_are_refused() -> None:
    for sides in ((2,), (0, 2)):
        with pytest.raises(ValueError, match="2 sides of at least 1"):
            regions_of(Grid(4, 4), sides)
