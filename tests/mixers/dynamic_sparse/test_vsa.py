"""VSA: both stages and their gates, written out over cubes."""

from __future__ import annotations

import pytest
import torch
from tests.support.formulas import follows
from tests.support.on_grids import boxes, faster_from, heads_of, joined, masked, of_blocks
from torch import Tensor, nn

from foveate import Grid
from foveate.catalogue.registry import mixer

DIM, HEADS = 12, 3


def projected(vsa: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (heads_of(x, each.weight, None, HEADS) for each in (vsa.to_q, vsa.to_k, vsa.to_v))
    return q, k, v


def formula(vsa: nn.Module, x: Tensor, dims: tuple[int, ...], cube: tuple[int, ...], count: int) -> Tensor:
    q, k, v = projected(vsa, x)
    cut = boxes(dims, cube)
    of_q, of_k, of_v = (torch.stack([each[:, :, tokens].mean(2) for tokens in cut], 2) for each in (q, k, v))
    scores = of_q @ of_k.mT / (DIM // HEADS) ** 0.5
    means = torch.softmax(scores, -1) @ of_v
    coarse = torch.zeros_like(q)
    table = torch.zeros(scores.shape, dtype=torch.bool)
    for r, tokens in enumerate(cut):
        coarse[:, :, tokens] = means[:, :, r : r + 1]
        for b, h in torch.cartesian_prod(torch.arange(len(x)), torch.arange(HEADS)).tolist():
            row = scores[b, h, r].tolist()
            table[b, h, r, sorted(range(len(cut)), key=lambda s: -row[s])[:count]] = True
    fine = masked(q, k, v, of_blocks(table, cut))
    gates = x @ vsa.to_gates.weight.T + vsa.to_gates.bias
    of_coarse, of_fine = gates.split(DIM, -1)
    return (of_coarse * joined(coarse) + of_fine * joined(fine)) @ vsa.to_out.weight.T


@pytest.mark.paper("VSA (Faster Video Diffusion with)", "definition")
@pytest.mark.paper("VSA (Faster Video Diffusion with)", "works_when")
@pytest.mark.parametrize(
    ("dims", "cube", "count"),
    [((4, 4, 6), (2, 2, 2), 3), ((3, 5, 7), (2, 2, 3), 4), ((5, 3, 4), (4, 4, 4), 1), ((2, 3, 2), (1, 1, 1), 5)],
)
def test_it_is_two_gated_stages_written_out(dims: tuple[int, ...], cube: tuple[int, ...], count: int) -> None:
    vsa = mixer("vsa", DIM, heads=HEADS, cube=cube, k=count).double()
    grid = Grid(*dims)
    x = torch.randn(2, grid.length, DIM, dtype=torch.float64, requires_grad=True)
    follows(vsa, lambda: vsa(x, layout=grid), lambda: formula(vsa, x, dims, cube, count), x)


@pytest.mark.paper("VSA (Faster Video Diffusion with)", "works_when")
def test_with_all_cubes_and_gates_of_0_and_1_it_is_full_attention() -> None:
    grid = Grid(3, 5, 7)
    vsa = mixer("vsa", DIM, heads=HEADS, cube=(2, 2, 2), k=2 * 3 * 4).double()
    x = torch.randn(2, grid.length, DIM, dtype=torch.float64)
    q, k, v = projected(vsa, x)
    dense = joined(torch.softmax(q @ k.mT / 2, -1) @ v) @ vsa.to_out.weight.T
    torch.testing.assert_close(vsa(x, layout=grid), dense, rtol=1e-9, atol=1e-9)
    few = mixer("vsa", DIM, heads=HEADS, cube=(2, 2, 2), k=23).double()
    few.load_state_dict(vsa.state_dict())
    assert (few(x, layout=grid) - dense).abs().max() > 1e-6


@pytest.mark.paper("VSA (Faster Video Diffusion with)", "works_when")
def test_it_was_measured_faster_than_dense_attention_at_long_lengths() -> None:
    faster_from("vsa", 8192, 4)


@pytest.mark.paper("VSA (Faster Video Diffusion with)", "definition")
def test_it_starts_as_attention_to_the_paper_s_number_of_cubes() -> None:
    vsa = mixer("vsa", DIM, heads=HEADS)
    assert vsa.cube == (4, 4, 4) and vsa.k == 32
    assert not vsa.to_gates.weight.any()
    assert vsa.to_gates.bias.tolist() == [0.0] * DIM + [1.0] * DIM
    with pytest.raises(ValueError, match="at least one"):
        mixer("vsa", DIM, heads=HEADS, k=0)
