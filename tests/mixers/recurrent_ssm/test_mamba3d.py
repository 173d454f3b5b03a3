"""Mamba3D: neighbours, pooling and scans by hand."""

from __future__ import annotations

import pytest
import torch
from tests.support.scan_formulas import (
    DIM,
    passed,
    shaken,
    tokens,
)
from torch.nn.functional import silu
from torch.testing import assert_close

from foveate import Grid, Points
from foveate.mixers.recurrent_ssm.mamba3d import LocalNormPooling, Mamba3D, nearest


def test_the_nearest_points_are_found() -> None:
    layout = Points(torch.rand(50, 3))
    distances = (layout.coords[:, None] - layout.coords).norm(dim=-1)
    assert torch.equal(nearest(layout, 5), distances.argsort(1)[:, :5])
    assert nearest(Grid(2, 2), 9).shape == (4, 4)


@pytest.mark.paper("Mamba3D", "definition")
def test_local_norm_pooling_by_hand() -> None:
    pool, x, layout = shaken(LocalNormPooling(DIM)), tokens(17), Points(torch.rand(17, 2))
    neighbours = nearest(layout, 4)
    out = torch.empty(2, 17, 2 * DIM, dtype=x.dtype)
    for row in range(2):
        relative = torch.stack([x[row, neighbours[i]] - x[row, i] for i in range(17)])
        relative = relative / (relative.square().mean().sqrt() + 1e-5)
        for i in range(17):
            features = torch.cat([relative[i], x[row, i].expand(4, -1)], -1) * pool.scale + pool.shift
            out[row, i] = (features * features.exp()).sum(0) / features.exp().sum(0)
    assert_close(pool(x, neighbours), silu(pool.to_out(pool.norm(out))))


@pytest.mark.paper("Mamba3D", "definition")
@pytest.mark.parametrize("backward", ["reversed", "channels"])
def test_mamba3d_scans_tokens_and_channels(backward: str) -> None:
    layout, x = Points(torch.rand(17, 3)), tokens(17)
    mixer = shaken(Mamba3D(DIM, backward=backward, expand=1, state=3))
    local = mixer.pool(mixer.norms[0](x), nearest(layout, 4))
    u, gate = mixer.to_in(mixer.norms[1](x + local)).chunk(2, -1)
    reading = u[..., torch.arange(DIM - 1, -1, -1)]
    if backward == "channels":
        lines = [passed(mixer.over_features, reading[:, i].unsqueeze(-1)) for i in range(17)]
        second = torch.stack(lines, 1).squeeze(-1)
    else:
        second = passed(mixer.over_features, reading)
    y = passed(mixer.over_tokens, u) + second.flip(-1)
    assert_close(mixer(x, layout=layout), local + mixer.to_out(y * silu(gate)))
    wanted = [*mixer.parameters()]
    for gradient in torch.autograd.grad(mixer(x, layout=layout).square().sum(), wanted):
        assert gradient.isfinite().all() and gradient.abs().sum() > 0
