"""HiLo: windows in some heads, means of windows in the others."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.support.formulas import shaken
from tests.support.heads import agree, heads, join, plain, split

from foveate import Grid
from foveate.mixers.multiscale_window.hilo import HiLo


@pytest.mark.paper("HiLo / LITv2", "definition")
@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 1])
@pytest.mark.parametrize(("grid", "window"), [(Grid(5, 7), 2), (Grid(4, 6), 3), (Grid(3, 4, 3), 2), (Grid(13), 4)])
def test_hilo_is_its_formula(alpha: float, grid: Grid, window: int) -> None:
    model, x = HiLo(32, heads=4, window=window, alpha=alpha), heads(2, grid.length, 32)
    shaken(model)
    cell = [tuple(c // window for c in place) for place in itertools.product(*map(range, grid.dims))]
    cells = sorted(set(cell))
    member = torch.tensor([[mine == other for other in cells] for mine in cell])  # (N, W)
    means = (member.double() / member.sum(0)).T @ x
    groups = []
    if model.high is not None:
        q, kv = split(model.high.to_q(x), model.high.heads), model.high.to_kv(x)
        k, v = (split(part, model.high.heads) for part in kv.chunk(2, -1))
        together = (member.double() @ member.double().T).bool()
        groups.append(model.high.to_out(join(plain(q, k, v, together))))
    if model.low is not None:
        q, kv = split(model.low.to_q(x), model.low.heads), model.low.to_kv(means)
        k, v = (split(part, model.low.heads) for part in kv.chunk(2, -1))
        groups.append(model.low.to_out(join(plain(q, k, v))))
    assert (model.low is None) == (alpha == 0) and (model.high is None) == (alpha == 1)
    agree(model(x, layout=grid), torch.cat(groups, -1), x, *model.parameters())


def test_hilo_with_a_window_of_one_is_plain_attention() -> None:
    model, x = shaken(HiLo(32, heads=4, window=1)), heads(2, 35, 32)
    q, kv = split(model.low.to_q(x), 4), model.low.to_kv(x)
    k, v = (split(part, 4) for part in kv.chunk(2, -1))
    agree(model(x, layout=Grid(5, 7)), model.low.to_out(join(plain(q, k, v))), x)
