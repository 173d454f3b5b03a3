"""VMoBA: blocks that differ by layer, and the choice over a whole head, by loops."""

from __future__ import annotations

import pytest
import torch
from tests.support.formulas import follows
from tests.support.on_grids import boxes, faster_from, heads_of, joined, masked, measured
from torch import Tensor, nn

from foveate import Grid
from foveate.catalogue.registry import mixer
from foveate.counting import count_operations

DIM, HEADS = 12, 3
SIZES = {"frames": 2, "patch": (2, 3), "cube": (2, 3, 2)}


def sides(dims: tuple[int, ...], layer: int) -> tuple[int, ...]:
    """Whole frames; a patch of all frames; a cube."""
    return ((2, *dims[1:]), (dims[0], 2, 3), (2, 3, 2))[layer % 3]


def chosen(q: Tensor, k: Tensor, cut: list[list[int]], tau: float) -> Tensor:
    """Pairs of tokens of one head: own blocks, then others by falling score until they have the share."""
    own = {token: number for number, tokens in enumerate(cut) for token in tokens}
    scores = {(i, b): float(q[i] @ k[tokens].mean(0)) for i in range(len(q)) for b, tokens in enumerate(cut)}
    low, high = min(scores.values()), max(scores.values())
    share = {pair: (score - low) / (high - low) for pair, score in scores.items()}
    got, wanted = sum(share[i, own[i]] for i in own), tau * sum(share.values())
    mask = torch.zeros(len(q), len(q), dtype=torch.bool)
    for i, b in own.items():
        mask[i, cut[b]] = True
    for i, b in sorted(share, key=lambda pair: -share[pair]):
        if got >= wanted:
            break
        if own[i] != b:
            mask[i, cut[b]] = True
            got += share[i, b]
    return mask


def projected(vmoba: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (heads_of(x, each.weight, None, HEADS) for each in (vmoba.to_q, vmoba.to_k, vmoba.to_v))
    return q, k, v


def formula(vmoba: nn.Module, x: Tensor, cut: list[list[int]], tau: float) -> Tensor:
    q, k, v = projected(vmoba, x)
    masks = [[chosen(a, b, cut, tau) for a, b in zip(*pair, strict=True)] for pair in zip(q.detach(), k.detach())]  # noqa: B905
    mask = torch.stack([torch.stack(each) for each in masks])
    return joined(masked(q, k, v, mask)) @ vmoba.to_out.weight.T


@pytest.mark.paper("VMoBA", "definition")
@pytest.mark.paper("VMoBA", "works_when")
@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize(("dims", "tau"), [((3, 4, 5), 0.5), ((4, 3, 4), 0.25)])
def test_it_is_a_choice_over_the_head_written_out(layer: int, dims: tuple[int, ...], tau: float) -> None:
    vmoba = mixer("vmoba", DIM, heads=HEADS, layer=layer, tau=tau, **SIZES).double()
    x = torch.randn(2, Grid(*dims).length, DIM, dtype=torch.float64, requires_grad=True)
    cut = boxes(dims, sides(dims, layer))
    follows(vmoba, lambda: vmoba(x, layout=Grid(*dims)), lambda: formula(vmoba, x, cut, tau), x)


@pytest.mark.paper("VMoBA", "works_when")
@pytest.mark.parametrize("layer", range(3))
def test_at_tau_1_it_is_full_attention(layer: int) -> None:
    vmoba = mixer("vmoba", DIM, heads=HEADS, layer=layer, tau=1.0, **SIZES).double()
    x = torch.randn(2, 60, DIM, dtype=torch.float64)
    q, k, v = projected(vmoba, x)
    dense = joined(torch.softmax(q @ k.mT / 2, -1) @ v) @ vmoba.to_out.weight.T
    torch.testing.assert_close(vmoba(x, layout=Grid(3, 4, 5)), dense, rtol=1e-9, atol=1e-9)


@pytest.mark.paper("VMoBA", "works_when")
def test_queries_of_a_head_get_unequal_numbers_of_blocks() -> None:
    """Two queries are sure of many keys, the others of none: a choice query by query could not tell them apart."""
    vmoba = mixer("vmoba", 4, heads=1, layer=2, cube=(1, 1, 1), tau=0.2).double()
    with torch.no_grad():
        for layer in (vmoba.to_q, vmoba.to_k, vmoba.to_v, vmoba.to_out):
            layer.weight.copy_(torch.eye(4))
        x = torch.zeros(1, 12, 4, dtype=torch.float64)
        x[0, :, 0] = 0.01
        x[0, :2, 0] = 5.0
        x[0, 2:6, 0] = 4.0
        with count_operations() as counted:
            vmoba(x, layout=Grid(1, 3, 4))
    assert 12 < counted.pairs < 40  # own blocks, and pairs among the six strong tokens


@pytest.mark.paper("VMoBA", "works_when")
def test_it_was_measured_with_its_choice_and_where_it_becomes_faster_is_known() -> None:
    slower = [line["tokens"] for line in measured("vmoba") if line["ratio"] < 1]
    faster = [line["tokens"] for line in measured("vmoba") if line["ratio"] > 1]
    assert slower and max(slower) < 1024 <= max(faster)
    faster_from("vmoba", 8192, 2)


def test_options_that_cannot_be_are_refused() -> None:
    for options, words in (({"tau": 0.0}, "share"), ({"tau": 1.5}, "share"), ({"layer": -1}, "numbered")):
        with pytest.raises(ValueError, match=words):
            mixer("vmoba", DIM, heads=HEADS, **options)
    assert mixer("vmoba", DIM, heads=HEADS).tau == 0.25
