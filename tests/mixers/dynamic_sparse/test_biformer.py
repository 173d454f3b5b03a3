"""BiFormer: routing between regions, by loops, and the attention that it leaves."""

from __future__ import annotations

import pytest
import torch
from tests.support.formulas import follows
from tests.support.on_grids import boxes, faster_from, heads_of, joined, masked, of_blocks
from torch import Tensor, nn
from torch.nn.functional import conv2d

from foveate import Grid
from foveate.catalogue.registry import mixer

DIM, HEADS = 12, 3


def projected(bra: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (heads_of(x, each.weight, each.bias, HEADS) for each in (bra.to_q, bra.to_k, bra.to_v))
    return q, k, v


def routed(q: Tensor, k: Tensor, cut: list[list[int]], count: int) -> Tensor:
    """Row r marks the ``count`` regions of the greatest products of mean query and mean key, over all heads."""
    queries, keys = joined(q.detach()), joined(k.detach())
    table = torch.zeros(len(q), 1, len(cut), len(cut), dtype=torch.bool)
    for b in range(len(q)):
        for r, tokens in enumerate(cut):
            scores = [float(queries[b, tokens].mean(0) @ keys[b, others].mean(0)) for others in cut]
            table[b, 0, r, sorted(range(len(cut)), key=lambda s: -scores[s])[:count]] = True
    return table


def formula(bra: nn.Module, x: Tensor, dims: tuple[int, int], side: int, count: int) -> Tensor:
    q, k, v = projected(bra, x)
    cut = boxes(dims, tuple(-(-size // side) for size in dims))
    mask = of_blocks(routed(q, k, cut, count), cut)
    mixed = joined(masked(q, k, v, mask, DIM**-0.5))
    image = joined(v).mT.unflatten(2, dims)
    local = conv2d(image, bra.local.weight, bra.local.bias, padding=2, groups=DIM).flatten(2).mT
    return (mixed + local) @ bra.to_out.weight.T + bra.to_out.bias


@pytest.mark.paper("BiFormer", "definition")
@pytest.mark.paper("BiFormer", "works_when")
@pytest.mark.parametrize(
    ("dims", "side", "count"), [((7, 11), 3, 2), ((9, 9), 3, 4), ((5, 8), 4, 3), ((8, 13), 7, 4), ((3, 3), 7, 1)]
)
def test_it_is_routing_and_masked_attention_written_out(dims: tuple[int, int], side: int, count: int) -> None:
    bra = mixer("bi_level_routing", DIM, heads=HEADS, regions=side, k=count).double()
    x = torch.randn(2, dims[0] * dims[1], DIM, dtype=torch.float64, requires_grad=True)
    follows(bra, lambda: bra(x, layout=Grid(*dims)), lambda: formula(bra, x, dims, side, count), x)


@pytest.mark.paper("BiFormer", "works_when")
@pytest.mark.parametrize("dims", [(7, 11), (6, 6)])
def test_with_all_regions_chosen_it_is_full_attention_beside_a_convolution(dims: tuple[int, int]) -> None:
    bra = mixer("bi_level_routing", DIM, heads=HEADS, regions=3, k=9).double()
    x = torch.randn(2, dims[0] * dims[1], DIM, dtype=torch.float64, requires_grad=True)

    def full() -> Tensor:
        q, k, v = projected(bra, x)
        local = conv2d(joined(v).mT.unflatten(2, dims), bra.local.weight, bra.local.bias, padding=2, groups=DIM)
        dense = torch.softmax(q @ k.mT / DIM**0.5, -1) @ v
        return (joined(dense) + local.flatten(2).mT) @ bra.to_out.weight.T + bra.to_out.bias

    follows(bra, lambda: bra(x, layout=Grid(*dims)), full, x)


@pytest.mark.paper("BiFormer", "works_when")
def test_with_its_gather_it_was_measured_faster_than_dense_attention() -> None:
    faster_from("bi_level_routing", 56 * 56, 2.5)


def test_the_defaults_are_the_paper_s() -> None:
    bra = mixer("bi_level_routing", 64)
    assert (bra.regions, bra.k, bra.local.kernel) == (7, 4, 5)
    assert mixer("bi_level_routing", 64, kernel=0).local is None
    with pytest.raises(ValueError, match="one is chosen"):
        mixer("bi_level_routing", 64, k=0)
    with pytest.raises(ValueError, match="2 axes"):
        bra(torch.randn(1, 8, 64), layout=Grid(2, 2, 2))
