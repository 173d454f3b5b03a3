"""Dual-path Mamba: its chunks, and its two passes by hand."""

from __future__ import annotations

import pytest
import torch
from tests.support.scan_formulas import (
    DIM,
    both_ways,
    rms,
    shaken,
    tokens,
)
from torch.testing import assert_close

from foveate.mixers.recurrent_ssm.dual_path import DualPathMamba, overlap_add, segment


@pytest.mark.parametrize("size", [2, 6, 16])
def test_overlapping_chunks_have_an_exact_inverse(size: int) -> None:
    for length in (1, 5, 16, 37):
        x = torch.randn(2, length, 3)
        chunks = segment(x, size)
        assert torch.equal(overlap_add(chunks, length), x)
        counted = overlap_add(torch.ones_like(chunks), length)
        assert torch.equal(counted, torch.ones_like(x))
        assert torch.equal(chunks[:, 1:, : size // 2], chunks[:, :-1, size // 2 :])


@pytest.mark.paper("Dual-path Mamba", "definition")
def test_dual_path_mamba_goes_inside_chunks_and_across() -> None:
    mixer, x = shaken(DualPathMamba(DIM, chunk=8, expand=1, state=3)), tokens(29)
    hop, count = 4, 9
    whole = torch.cat([torch.zeros(2, hop, DIM).double(), x, torch.zeros(2, 7, DIM).double()], 1)
    chunks = torch.stack([whole[:, at * hop : at * hop + 8] for at in range(count)], 1)
    first = rms(chunks) * mixer.norms[0].weight
    inside = torch.stack([both_ways(mixer.inside, first[:, at]) for at in range(count)], 1)
    second = rms(chunks + inside) * mixer.norms[1].weight
    across = torch.stack([both_ways(mixer.across, second[:, :, place]) for place in range(8)], 2)
    total = torch.zeros_like(whole)
    for at in range(count):
        total[:, at * hop : at * hop + 8] += (inside + across)[:, at] / 2
    assert_close(mixer(x), total[:, hop : hop + 29])


def test_dual_paths_reach_everywhere() -> None:
    mixer = shaken(DualPathMamba(DIM, chunk=4, expand=1, state=3))
    x = tokens(40, batch=1).requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(x)[0, 20].sum(), x)
    assert bool((gradient.abs().sum(-1) > 0).all())
