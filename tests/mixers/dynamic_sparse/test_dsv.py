"""DSV: critical keys of groups of queries by loops; what the predictor learns; loads shared out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.support.formulas import follows
from tests.support.on_grids import boxes, heads_of, joined, masked
from torch import Tensor, nn

from foveate import Grid
from foveate.catalogue.registry import mixer
from foveate.counting import count_operations
from foveate.layouts.regions import regions_of
from foveate.parallel.balance import balanced

DIM, HEADS = 12, 3
GROUP = (2, 2, 2)


def made(keep: float | tuple[float, ...], rank: int = 3) -> nn.Module:
    return mixer("dsv", DIM, heads=HEADS, rank=rank, keep=keep, group=GROUP).double()


def projected(dsv: nn.Module, x: Tensor) -> list[Tensor]:
    layers = (dsv.to_q, dsv.to_k, dsv.to_v, dsv.low_q, dsv.low_k)
    return [heads_of(x, layer.weight, None, HEADS) for layer in layers]


def formula(dsv: nn.Module, x: Tensor, dims: tuple[int, ...], shares: tuple[float, ...]) -> Tensor:
    q, k, v, low_q, low_k = projected(dsv, x)
    length = x.shape[1]
    mask = torch.zeros(len(x), HEADS, length, length, dtype=torch.bool)
    for b, h in itertools.product(range(len(x)), range(HEADS)):
        for tokens in boxes(dims, GROUP):
            mean = low_q[b, h, tokens].detach().mean(0)
            scores = [float(mean @ low_k[b, h, j].detach()) for j in range(length)]
            best = sorted(range(length), key=lambda j: -scores[j])[: math.ceil(shares[h] * length)]
            for i in tokens:
                mask[b, h, i, best] = True
    return joined(masked(q, k, v, mask)) @ dsv.to_out.weight.T


@pytest.mark.paper("DSV", "definition")
@pytest.mark.paper("DSV", "works_when")
@pytest.mark.parametrize(
    ("dims", "keep"), [((3, 5, 4), 0.2), ((2, 4, 4), (0.1, 0.5, 1.0)), ((4, 3, 3), (0.9, 0.03, 0.3))]
)
def test_it_is_attention_to_the_critical_keys_written_out(
    dims: tuple[int, ...], keep: float | tuple[float, ...]
) -> None:
    dsv, grid = made(keep), Grid(*dims)
    shares = keep if isinstance(keep, tuple) else (keep,) * HEADS
    x = torch.randn(2, grid.length, DIM, dtype=torch.float64, requires_grad=True)
    follows(dsv, lambda: dsv(x, layout=grid), lambda: formula(dsv, x, dims, shares), x)


@pytest.mark.paper("DSV", "definition")
def test_the_predictor_s_loss_and_the_profile_written_out() -> None:
    dsv = made(1.0)
    x = torch.randn(2, 24, DIM, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        q, k, _, low_q, low_k = projected(dsv, x)
        guessed, true = low_q @ low_k.mT, (q @ k.mT).detach()
        cosine = (guessed * true).sum(-1) / (guessed.norm(dim=-1) * true.norm(dim=-1))
        return (1 - cosine).mean()

    follows(dsv, lambda: dsv.distillation_loss(x), loss, x)
    q, k, *_ = projected(dsv, x)
    weights = torch.softmax(q @ k.mT / 2, -1).detach()
    needed = torch.zeros(HEADS)
    for b, h, i in itertools.product(range(2), range(HEADS), range(24)):
        held = 0.0
        for weight in sorted(weights[b, h, i].tolist(), reverse=True):
            if held >= 0.7:
                break
            held += weight
            needed[h] += 1
    assert dsv.profile(x, 0.7) == pytest.approx((needed / 48 / 24).tolist())


@pytest.mark.paper("DSV", "works_when")
def test_after_its_first_stage_the_predictor_finds_more_of_the_weights() -> None:
    dsv = mixer("dsv", 16, heads=2, rank=4, keep=1.0)
    with torch.no_grad():
        for layer in (dsv.to_q, dsv.to_k):
            layer.weight.mul_(3)
    grid = Grid(2, 4, 4)
    optimiser = torch.optim.Adam([*dsv.low_q.parameters(), *dsv.low_k.parameters()], lr=2e-2)

    @torch.no_grad()
    def held(x: Tensor) -> float:
        """Share of full attention's weights on the keys chosen."""
        dsv.keep = 0.25
        q, k, _ = dsv.project(x, x)
        groups = boxes(grid.dims, GROUP)
        chosen = dsv.critical(x, regions_of(grid, GROUP))
        weights = torch.softmax(q @ k.mT / 8**0.5, -1)
        dsv.keep = 1.0
        return sum(
            float((weights[:, :, tokens] * chosen[:, :, g : g + 1]).sum()) for g, tokens in enumerate(groups)
        ) / (weights.shape[0] * 2 * 32)

    def video(batch: int) -> Tensor:
        return torch.randn(batch, 8, 1, 16).expand(-1, -1, 4, -1).flatten(1, 2) + 0.3 * torch.randn(batch, 32, 16)

    fresh = video(8)
    before = held(fresh)
    for _ in range(100):
        loss = dsv.distillation_loss(video(4))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert held(fresh) > before + 0.1


@pytest.mark.paper("DSV", "works_when")
def test_only_critical_pairs_are_computed_upon() -> None:
    dsv = mixer("dsv", DIM, heads=HEADS, rank=3, keep=(0.05, 0.25, 0.5))
    with torch.no_grad(), count_operations() as counted:
        dsv(torch.randn(1, 200, DIM), layout=Grid(2, 10, 10))
    assert counted.pairs == 200 * (10 + 50 + 100)


@pytest.mark.paper("DSV", "works_when")
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_loads_of_sparse_heads_are_shared_out_evenly(ranks: int) -> None:
    """Simulated ranks: loads of each are added up, head by head and query by query."""
    shares = [0.9, 0.02, 0.4, 0.05, 0.05, 0.6, 0.1, 0.03, 0.3, 0.08, 0.02, 0.2]
    found = balanced(shares, ranks)
    assert sorted(head for group in found.heads for head in group) == list(range(12))
    assert len(found.heads) * found.sequence == ranks
    of_rank = [
        sum(shares[head] for head in group) / found.sequence for group in found.heads for _ in range(found.sequence)
    ]
    mean = sum(shares) / ranks
    assert found.slowest == pytest.approx(max(of_rank) / mean)
    assert found.slowest <= 1.1
    blind = [sum(shares[first::ranks]) for first in range(ranks)]  # heads dealt out, whatever their loads
    assert max(of_rank) < max(blind)


def test_heads_alone_are_within_a_third_of_the_best() -> None:
    """What Graham proved of this rule, against every way to share out."""
    for _ in range(20):
        loads = torch.rand(7).tolist()
        best = min(
            max(sum(load for load, to in zip(loads, ways, strict=True) if to == rank) for rank in range(3))
            for ways in itertools.product(range(3), repeat=7)
        )
        found = balanced(loads, 3, sequence=1)
        assert found.slowest * sum(loads) / 3 <= (4 / 3 - 1 / 9) * best + 1e-9


def test_what_cannot_be_is_refused() -> None:
    for keep in (0.0, (0.5, 0.5), 1.5):
        with pytest.raises(ValueError, match="keep is a share"):
            made(keep)
    with pytest.raises(ValueError, match="a load of at least 0"):
        balanced([], 2)
    with pytest.raises(ValueError, match="whole groups"):
        balanced([1.0, 2.0], 4, sequence=3)
