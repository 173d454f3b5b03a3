"""VMamba: its blocks written out, and how it begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.scan_formulas import agree, along, as_it_begins, convolved_around, scanned, shaken
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, layer_norm, silu

from foveate import Grid
from foveate.mixers.recurrent_ssm.mamba import SelectiveScan
from foveate.mixers.recurrent_ssm.vmamba import VMamba
from foveate.models.vision import vmamba_backbone


def normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-5)


def ss2d(mixer: VMamba, x: Tensor, grid: Grid) -> Tensor:
    """Four scans of a convolved image, added, normed and mapped; no gate."""
    u = silu(convolved_around(mixer.conv, x @ mixer.to_in.weight.mT, grid))
    rows = torch.arange(grid.length)
    columns = rows.view(grid.dims).T.flatten()
    paths = [rows, columns, rows.flip(0), columns.flip(0)]
    y = sum(along(path, lambda v: scanned(ssm, v), u) for path, ssm in zip(paths, mixer.passes, strict=True))  # noqa: B023
    return normed(mixer.norm, y) @ mixer.to_out.weight.mT


def halved(conv: nn.Conv2d, norm: nn.LayerNorm, images: Tensor) -> Tensor:
    small = conv2d(images, conv.weight, conv.bias, stride=2, padding=1)
    return normed(norm, small.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.paper("VMamba / SS2D", "definition")
@pytest.mark.parametrize("begun", [as_it_begins, shaken])
def test_the_backbone_is_the_paper_s_written_out(begun: Any) -> None:
    model = begun(vmamba_backbone(5, dims=(8, 12), depths=(1, 2), expand=2, state=2))
    images = torch.randn(2, 3, 19, 26, dtype=torch.float64, requires_grad=True)
    first, norm, _, second, last = model.shrinks[0]
    x = halved(second, last, gelu(halved(first, norm, images)))
    assert x.shape[2:] == (5, 7)
    for stage in range(2):
        x = halved(model.shrinks[1][0], model.shrinks[1][1], x) if stage else x
        grid, tokens = Grid(*x.shape[2:]), x.flatten(2).mT
        for scans, mlp in model.stages[stage]:
            tokens = tokens + ss2d(scans.inner, normed(scans.norm, tokens), grid)
            hidden = gelu(normed(mlp.norm, tokens) @ mlp.inner.first.weight.mT + mlp.inner.first.bias)
            tokens = tokens + hidden @ mlp.inner.second.weight.mT + mlp.inner.second.bias
        x = tokens.mT.unflatten(2, grid.dims)
    assert x.shape == (2, 12, 3, 4)
    read = normed(model.neck, x.flatten(2).mT).mean(1)
    agree(model, model(images), read @ model.head.weight.mT + model.head.bias, images)


@pytest.mark.paper("VMamba / SS2D", "definition")
def test_it_begins_as_the_authors_does() -> None:
    model = vmamba_backbone(10, dims=(96, 192), depths=(1, 1))
    scans, mlp = model.stages[0][0]
    for linear in (scans.inner.to_in, scans.inner.to_out, mlp.inner.first, mlp.inner.second, model.head):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert linear.bias is None or not linear.bias.any()
    for ssm in scans.inner.passes:
        assert isinstance(ssm, SelectiveScan) and ssm.rank == 6
        bound = ssm.to_choices.in_features**-0.5
        assert 0.9 * bound < ssm.to_choices.weight.abs().max() <= bound
        assert 0.8 * ssm.rank**-0.5 < ssm.to_step.weight.abs().max() <= ssm.rank**-0.5
        assert torch.equal(ssm.A_log, torch.zeros(96, 1)) and torch.equal(ssm.D, torch.ones(96))
