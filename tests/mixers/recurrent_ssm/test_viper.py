"""Viper's modulated scan by hand."""

from __future__ import annotations

import pytest
import torch
from tests.support.counted_work import work
from tests.support.scan_formulas import (
    DIM,
    shaken,
    tokens,
)
from torch import Tensor
from torch.nn.functional import silu
from torch.testing import assert_close

from foveate.mixers.recurrent_ssm.viper import FiLM, ViperScan


@pytest.mark.paper("Viper-F1", "definition")
def test_viper_modulates_its_scan_by_what_each_token_matches() -> None:
    mixer = shaken(ViperScan(DIM, top=3, match=6, state=4))
    x, patches = tokens(9), tokens(20)
    query, key = mixer.to_query(x), mixer.to_key(patches)
    matched = torch.zeros(2, 9, 6, dtype=x.dtype)
    for row in range(2):
        for t in range(9):
            cosine = torch.cosine_similarity(query[row, t].unsqueeze(0), key[row], dim=-1)
            best = cosine.argsort(descending=True)[:3]
            weights = (cosine[best] / 0.1).softmax(0)
            matched[row, t] = weights @ mixer.to_value(patches[row, best])

    def film(layer: FiLM, y: Tensor) -> Tensor:
        gamma, beta = layer.to_both(matched).chunk(2, -1)
        return (1 + gamma) * y + beta

    u, gate = mixer.to_in(x).chunk(2, -1)
    u, ssm = silu(film(mixer.enter, u)), mixer.ssm
    low, write, read = ssm.to_choices(u).split([ssm.rank, 4, 4], -1)
    step, write, read = film(mixer.dynamics, torch.cat([ssm.to_step(low), write, read], -1)).split([DIM, 4, 4], -1)
    step = torch.log1p((step + ssm.step_bias).exp())
    state, outs = torch.zeros(2, DIM, 4, dtype=x.dtype), []
    for t in range(9):
        state = torch.exp(-step[:, t, :, None] * ssm.A_log.exp()) * state
        state = state + (step[:, t] * u[:, t]).unsqueeze(-1) * write[:, t, None, :]
        outs.append((state * read[:, t, None, :]).sum(-1) + ssm.D * u[:, t])
    y = torch.stack(outs, 1) * silu(gate)
    out, expected = mixer(x, context=patches), film(mixer.leave, mixer.to_out(y))
    assert_close(out, expected)
    mine, plain = (torch.autograd.grad(each.square().sum(), [*mixer.parameters()]) for each in (out, expected))
    assert_close(mine, plain)


def test_counted_work_of_viper_grows_linearly() -> None:
    mixer, patches = ViperScan(DIM, top=3, match=6, state=4), torch.randn(1, 20, DIM)
    counted = [work(lambda: mixer(torch.randn(1, n, DIM), context=patches)) for n in (512, 1024, 2048)]  # noqa: B023
    assert 1.9 < counted[1] / counted[0] < 2.1 and 1.9 < counted[2] / counted[1] < 2.1


def test_viper_looks_at_its_best_patches_only() -> None:
    mixer = shaken(ViperScan(DIM, top=2, match=6, state=4))
    x, patches = tokens(3), tokens(20).requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(x, context=patches).square().sum(), patches)
    assert int((gradient.abs().sum(-1) > 0).sum(1).max()) <= 3 * 2
    assert mixer(x, context=patches[:, :0]).isfinite().all()
