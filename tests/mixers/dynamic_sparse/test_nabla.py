"""NABLA: the map between means, its cumulative threshold and the neighbourhood beside it, by loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.support.formulas import follows
from tests.support.on_grids import boxes, faster_from, heads_of, joined, masked, of_blocks
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from foveate import Grid, attend
from foveate.catalogue.registry import mixer
from foveate.layouts.regions import regions_of
from foveate.mixers.dynamic_sparse.on_regions import chosen_regions
from foveate.patterns import to_block_mask

DIM, HEADS = 12, 3
Near = tuple[int, int, int] | None


def projected(nabla: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (heads_of(x, each.weight, None, HEADS) for each in (nabla.to_q, nabla.to_k, nabla.to_v))
    return q, k, v


def table(q: Tensor, k: Tensor, dims: tuple[int, ...], block: tuple[int, ...], mass: float, near: Near) -> Tensor:
    """Of each row of the softmax map the least shares go, while those that go keep below 1 - mass."""
    cut = boxes(dims, block)
    places = list(itertools.product(*(range(-(-size // side)) for size, side in zip(dims, block, strict=True))))
    means = [torch.stack([each.detach()[:, :, tokens].mean(2) for tokens in cut], 2) for each in (q, k)]
    shares = torch.softmax(means[0] @ means[1].mT / q.shape[3] ** 0.5, -1)
    seen = torch.zeros(shares.shape, dtype=torch.bool)
    for b, h, r in itertools.product(*map(range, shares.shape[:3])):
        passed = 0.0
        for s in sorted(range(len(cut)), key=lambda s: float(shares[b, h, r, s])):
            passed += float(shares[b, h, r, s])
            seen[b, h, r, s] = passed >= 1 - mass
        for s, place in enumerate(places):
            if near and all(abs(p - o) <= size // 2 for p, o, size in zip(place, places[r], near, strict=True)):
                seen[b, h, r, s] = True
    return seen


def formula(
    nabla: nn.Module, x: Tensor, dims: tuple[int, ...], block: tuple[int, ...], mass: float, near: Near
) -> Tensor:
    q, k, v = projected(nabla, x)
    mask = of_blocks(table(q, k, dims, block, mass, near), boxes(dims, block))
    return joined(masked(q, k, v, mask)) @ nabla.to_out.weight.T


@pytest.mark.paper("NABLA", "definition")
@pytest.mark.paper("NABLA", "works_when")
@pytest.mark.parametrize(
    ("dims", "block", "mass", "near"),
    [
        ((3, 4, 6), (1, 2, 2), 0.6, None),
        ((3, 5, 7), (1, 2, 3), 0.3, (3, 1, 3)),
        ((5, 3, 4), (1, 1, 2), 0.2, (1, 3, 3)),
        ((2, 7, 3), (2, 2, 2), 0.8, (1, 1, 1)),
    ],
)
def test_it_is_a_threshold_over_means_written_out(
    dims: tuple[int, ...], block: tuple[int, ...], mass: float, near: Near
) -> None:
    nabla = mixer("nabla", DIM, heads=HEADS, mass=mass, near=near, block=block).double()
    grid = Grid(*dims)
    x = torch.randn(2, grid.length, DIM, dtype=torch.float64, requires_grad=True)
    follows(nabla, lambda: nabla(x, layout=grid), lambda: formula(nabla, x, dims, block, mass, near), x)


@pytest.mark.paper("NABLA", "works_when")
def test_at_the_whole_mass_it_is_full_attention() -> None:
    nabla = mixer("nabla", DIM, heads=HEADS, mass=1.0, near=None, block=(1, 2, 3)).double()
    x = torch.randn(2, 105, DIM, dtype=torch.float64, requires_grad=True)

    def dense() -> Tensor:
        q, k, v = projected(nabla, x)
        return joined(torch.softmax(q @ k.mT / 2, -1) @ v) @ nabla.to_out.weight.T

    follows(nabla, lambda: nabla(x, layout=Grid(3, 5, 7)), dense, x)


@pytest.mark.paper("NABLA", "works_when")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dims", [(2, 16, 16), (2, 13, 18)])
def test_flex_attention_and_our_own_ways_agree_on_its_blocks(dims: tuple[int, ...]) -> None:
    nabla, grid = mixer("nabla", 16, heads=2, mass=0.5, near=(1, 1, 3)), Grid(*dims)
    blocks = regions_of(grid, nabla.block)
    heads = [blocks.split(torch.randn(1, 2, grid.length, 8)).requires_grad_() for _ in range(3)]
    chosen = nabla.chosen(heads[0], heads[1], blocks)
    assert 0.2 < chosen.float().mean() < 0.95
    pattern = chosen_regions(chosen, blocks)
    mask = to_block_mask(pattern, heads[0].shape[2], device="cpu")
    outs = [attend(*heads, pattern, impl=impl) for impl in ("reference", "tiles", "auto")]
    flex = flex_attention(*(head.detach() for head in heads), block_mask=mask)  # it has no backward on a CPU
    torch.testing.assert_close(blocks.join(flex), blocks.join(outs[0]), rtol=1e-4, atol=1e-5)
    towards = torch.randn(1, 2, grid.length, 8)
    wanted, *others = (torch.autograd.grad(blocks.join(out), heads, towards) for out in outs)
    for out, gradients in zip(outs[1:], others, strict=True):
        torch.testing.assert_close(blocks.join(out), blocks.join(outs[0]), rtol=1e-4, atol=1e-5)
        for mine, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_defaults_and_refusals() -> None:
    nabla = mixer("nabla", DIM, heads=HEADS)
    assert (nabla.mass, nabla.near, nabla.block) == (0.9, (11, 3, 3), (1, 8, 8))
    with pytest.raises(ValueError, match="share of a softmax"):
        mixer("nabla", DIM, heads=HEADS, mass=0.0)
    faster_from("nabla", 8192, 1.5)
