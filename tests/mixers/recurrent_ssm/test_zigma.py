"""ZigMa against Mamba along serpentines."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.support.scan_formulas import (
    DIM,
    along,
    gated,
    shaken,
    tokens,
)
from torch import Tensor
from torch.testing import assert_close

from foveate import Grid
from foveate.layouts import zigzag
from foveate.mixers.recurrent_ssm.zigma import ZigMa


def serpentines(height: int, width: int) -> list[Tensor]:
    """The eight paths that turn round at each border: from each corner, along the rows or along the columns."""
    paths = []
    for along_columns, last_row, last_column in itertools.product((False, True), repeat=3):
        places = torch.arange(height * width).view(height, width)
        places = places.flip([axis for axis, far in enumerate((last_row, last_column)) if far])
        lines = [line.tolist() for line in (places.T if along_columns else places)]
        paths.append(torch.tensor([at for i, line in enumerate(lines) for at in (line[::-1] if i % 2 else line)]))
    return paths


@pytest.mark.paper("ZigMa", "definition")
def test_zigma_cycles_over_the_eight_serpentines() -> None:
    height, width = 5, 7
    paths, used, x = serpentines(height, width), [], tokens(35)
    for path in paths:
        assert path.sort().values.tolist() == list(range(35))
        steps = (path[1:] // width - path[:-1] // width).abs() + (path[1:] % width - path[:-1] % width).abs()
        assert (steps == 1).all()  # neighbours on the path are neighbours on the grid
    for depth in range(10):
        mixer = shaken(ZigMa(DIM, layer=depth, state=5))
        out = mixer(x, layout=Grid(height, width))
        same = [torch.allclose(out, along(path, lambda u: gated(mixer.mamba, u), x)) for path in paths]  # noqa: B023
        assert sum(same) == 1
        used.append(same.index(True))
    assert sorted(used[:8]) == list(range(8)) and used[8:] == used[:2]


@pytest.mark.parametrize("layer", [0, 3, 7, 9])
def test_zigma_is_mamba_along_the_zigzag_of_its_layer(layer: int) -> None:
    grid, mixer, x = Grid(5, 7), shaken(ZigMa(DIM, layer=layer, state=5)), tokens(35)
    index = zigzag(grid)[layer % 8].index
    assert_close(mixer(x, layout=grid), along(index, mixer.mamba, x))


def test_zigma_takes_videos_apart() -> None:
    grid, x = Grid(3, 4, 5), tokens(60)
    kinds = []
    for layer in range(8):
        mixer = shaken(ZigMa(DIM, layer=layer, state=5))
        changed = x.clone()
        changed[:, 20:40] += torch.randn(2, 20, DIM).double()  # the middle frame
        moved = (mixer(changed, layout=grid) - mixer(x, layout=grid)).abs().sum((0, 2)).view(3, 20)
        if bool((moved[[0, 2]] == 0).all()):
            kinds.append("space")
            frame = mixer.mamba(x[:, :20, :][:, mixer.path(grid)[0].index[:20]])
            assert_close(mixer(x, layout=grid)[:, mixer.path(grid)[0].index[:20]], frame)
        else:
            kinds.append("time")
            pixel = x[:, 7::20]
            forwards = layer % 6 == 2
            line = mixer.mamba(pixel) if forwards else mixer.mamba(pixel.flip(1)).flip(1)
            assert_close(mixer(x, layout=grid)[:, 7::20], line)
    assert kinds == ["space", "space", "time"] * 2 + ["space", "space"]
    spatial = [ZigMa(8, layer=layer).path(grid)[0].index[:20].tolist() for layer in (0, 1, 3, 4, 6, 7, 9, 10)]
    assert len({tuple(path) for path in spatial}) == 8
