"""VMamba against naive scans in all directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.scan_formulas import (
    DIM,
    agree,
    along,
    begun_and_shaken,
    convolved_around,
    scanned,
    shaken,
    tokens,
)
from torch.nn.functional import silu

from foveate import Grid
from foveate.mixers.recurrent_ssm.vmamba import VMamba


@pytest.mark.paper("VMamba / SS2D", "definition")
@begun_and_shaken
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("grid", [Grid(5, 7), Grid(2, 3, 4)], ids=str)
def test_vmamba_scans_an_image_in_all_directions(grid: Grid, gate: bool, begun: Any) -> None:
    mixer, x = begun(VMamba(DIM, axes=grid.num_axes, state=5, gate=gate)), tokens(grid.length).requires_grad_()
    u, opened = (x @ mixer.to_in.weight.mT).split(2 * DIM, -1) if gate else (x @ mixer.to_in.weight.mT, None)
    u = silu(convolved_around(mixer.conv, u, grid))
    place = torch.arange(grid.length).view(grid.dims)
    ways = [(0, 1), (1, 0)] if grid.num_axes == 2 else [(0, 1, 2), (0, 2, 1), (1, 2, 0)]  # the last axis is walked
    paths = [place.permute(way).flatten() for way in ways]
    paths += [path.flip(0) for path in paths]
    assert len(paths) == len(mixer.passes)
    y = sum(along(path, lambda v: scanned(ssm, v), u) for path, ssm in zip(paths, mixer.passes, strict=True))  # noqa: B023
    normed = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    y = normed * mixer.norm.weight + mixer.norm.bias
    agree(mixer, mixer(x, layout=grid), mixer.to_out(y if opened is None else y * silu(opened)), x)


def test_every_pixel_of_vmamba_sees_every_other() -> None:
    grid, mixer = Grid(4, 5), shaken(VMamba(DIM, state=5))
    x = tokens(20, batch=1).requires_grad_()
    out = mixer(x, layout=grid)
    for pixel in range(20):
        (gradient,) = torch.autograd.grad(out[0, pixel].sum(), x, retain_graph=True)
        assert bool((gradient[0].abs().sum(-1) > 0).all())
