"""Applications to images: windows that hold foreground, and keys of the best scores."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.on_grids import boxes
from torch import Tensor
from torch.testing import assert_close

from foveate import Grid, causal
from foveate.adapt import as_core
from foveate.catalogue import tiers
from foveate.catalogue.contracts import Hook
from foveate.counting import count_operations


def hook(name: str, **sizes: object) -> Hook:
    row = tiers.row(name)
    assert isinstance(row, tiers.HookRow)
    return row.make(**sizes)


def run(found: Hook, heads: list[Tensor]) -> Tensor:
    return as_core(found.operator, **found.options)(*heads, layout=found.layout)


def same_with_gradients(found: Tensor, expected: Tensor, heads: list[Tensor]) -> None:
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
    towards = torch.randn_like(expected)
    mine, other = (torch.autograd.grad(out, heads, towards) for out in (found, expected))
    for one, two in zip(mine, other, strict=True):
        assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.paper("Dome-DETR", "definition")
@pytest.mark.paper("Dome-DETR", "works_when")
@pytest.mark.parametrize(("dims", "window", "batched"), [((7, 9), 3, False), ((8, 10), 4, True), ((5, 6), 7, False)])
def test_windows_with_foreground_attend_and_no_others(dims: tuple[int, int], window: int, batched: bool) -> None:
    foreground = torch.rand((2, *dims) if batched else dims) < 0.06
    foreground[..., 2, 3] = True
    found = hook("dome_detr", height=dims[0], width=dims[1], window=window, foreground=foreground)
    heads = [torch.randn(2, 3, dims[0] * dims[1], 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    q, k, v = heads
    expected, flags = torch.zeros_like(q), foreground.expand(2, *dims).flatten(1)
    for b in range(2):
        for tokens in boxes(dims, (window, window)):
            if flags[b, tokens].any():
                weights = torch.softmax(q[b, :, tokens] @ k[b, :, tokens].mT / 2, -1)
                inside = torch.zeros_like(expected)
                inside[b, :, tokens] = weights @ v[b, :, tokens]
                expected = expected + inside
    same_with_gradients(run(found, heads), expected, heads)


@pytest.mark.paper("Dome-DETR", "works_when")
def test_the_cost_is_that_of_the_windows_kept() -> None:
    heads = [torch.randn(1, 8, 100**2, 32) for _ in range(3)]
    for kept in (1, 7, 100):
        foreground = torch.zeros(100, 100, dtype=torch.bool)
        for number in range(kept):
            foreground[number // 10 * 10 + 3, number % 10 * 10 + 8] = True
        with count_operations() as counted:
            run(hook("dome_detr", foreground=foreground), heads)
        assert counted.pairs == kept * 8 * 100**2


def test_foreground_goes_with_its_grid_and_nothing_sees_beyond_what_it_may() -> None:
    core = as_core("kept_windows", window=3, foreground=torch.rand(5, 6) < 0.2)
    heads = [torch.randn(1, 2, 30, 4, dtype=torch.float64) for _ in range(3)]
    with pytest.raises(ValueError, match="foreground is of Grid"):
        core(*heads, layout=Grid(6, 5))
    with pytest.raises(ValueError, match="foreground is boolean"):
        as_core("kept_windows", window=3, foreground=torch.rand(5, 6))
    seen = core.pattern.mask(30, layout=Grid(5, 6))[0, 0] & torch.ones(30, 30).tril().bool()
    logits = (heads[0] @ heads[1].mT / 2).masked_fill(~seen, -torch.inf)
    expected = torch.softmax(logits, -1).nan_to_num(0.0) @ heads[2]
    assert_close(core(*heads, within=causal, layout=Grid(5, 6)), expected)


@pytest.mark.paper("DFIR-DETR", "definition")
@pytest.mark.paper("DFIR-DETR", "works_when")
def test_each_token_sees_the_keys_of_its_best_scores() -> None:
    found = hook("dfir_detr", height=5, width=7, keys=6)
    heads = [torch.randn(2, 3, 35, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    q, k, v = heads
    rows = []
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(35)).tolist():
        scores = [float(q[b, h, i].detach() @ k[b, h, j].detach()) for j in range(35)]
        best = sorted(range(35), key=lambda j: -scores[j])[:6]
        rows.append(torch.softmax(k[b, h, best] @ q[b, h, i] / math.sqrt(4), 0) @ v[b, h, best])
    same_with_gradients(run(found, heads), torch.stack(rows).view(2, 3, 35, 4), heads)


@pytest.mark.paper("DFIR-DETR", "works_when")
def test_values_are_read_n_k_times_and_the_choice_says_that_it_scores_all_pairs() -> None:
    found = hook("dfir_detr")
    heads = [torch.randn(1, 8, 400, 32) for _ in range(3)]
    with count_operations() as counted:
        run(found, heads)
    assert counted.pairs == 8 * 400 * 64
    assert "all N^2 scores are computed" in str(tiers.row("dfir_detr").target.__doc__)
