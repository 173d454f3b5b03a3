"""GPSA: two softmaxes and a gate, against dense tables on grids that are not square."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.formulas import follows
from torch import Tensor

from foveate import Grid
from foveate.catalogue.registry import mixer

DIM, HEADS, WIDTH = 20, 5, 4
GRID = Grid(3, 5)


def weights_of(layer: torch.nn.Module, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Content's and position's weights, (B, H, N, N) and (H, N, N)."""
    height, width = grid.dims
    q, k = ((x @ w.weight.T).unflatten(-1, (-1, WIDTH)) for w in (layer.to_q, layer.to_k))
    content = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(WIDTH)
    rows = []
    for i in range(height * width):
        for j in range(height * width):
            dy, dx = j // width - i // width, j % width - i % width
            rows.append(layer.position @ torch.tensor([dx, dy, dx * dx + dy * dy], dtype=x.dtype))
    place = torch.stack(rows, 1).view(-1, height * width, height * width)
    return content.softmax(-1), place.softmax(-1)


def formula(layer: torch.nn.Module, x: Tensor, grid: Grid = GRID) -> Tensor:
    content, place = weights_of(layer, x, grid)
    share = 1 / (1 + torch.exp(-layer.gate)).view(-1, 1, 1)
    v = (x @ layer.to_v.weight.T).unflatten(-1, (-1, WIDTH))
    mixed = torch.einsum("bhij,bjhd->bihd", (1 - share) * content + share * place, v)
    return mixed.flatten(2) @ layer.to_out.weight.T


@pytest.mark.paper("ConViT (GPSA)", "definition")
@pytest.mark.paper("ConViT (GPSA)", "works_when")
def test_it_is_its_formula_forward_and_backward() -> None:
    layer = mixer("gpsa", DIM, heads=HEADS).double()
    x = torch.randn(2, 15, DIM, dtype=torch.float64, requires_grad=True)
    follows(layer, lambda: layer(x, layout=GRID), lambda: formula(layer, x), x)


@pytest.mark.paper("ConViT (GPSA)", "definition")
@pytest.mark.paper("ConViT (GPSA)", "works_when")
@pytest.mark.parametrize(("heads", "side"), [(9, 3), (4, 2), (10, 3)])
def test_it_begins_as_a_convolution(heads: int, side: int) -> None:
    """Sharply local heads read one place each, those of a kernel around the token."""
    dim = 4 * heads
    layer = mixer("gpsa", dim, heads=heads, locality=30.0).double()
    assert layer.gate.tolist() == [1.0] * heads
    assert torch.equal(layer.to_v.weight, torch.eye(dim, dtype=torch.float64))
    with torch.no_grad():
        layer.gate.fill_(1e3)
        layer.to_out.weight.copy_(torch.eye(dim))
    x = torch.randn(1, 35, dim, dtype=torch.float64)
    out = layer(x, layout=Grid(5, 7)).view(5, 7, heads, 4)
    image = x.view(5, 7, heads, 4)
    if side % 2:
        reads = [image[2 + dy, 3 + dx, dy + 1 + 3 * (dx + 1)] for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
    else:  # half-way between four tokens: their mean
        reads = [
            image[2 + a - 1 : 2 + a + 1, 3 + b - 1 : 3 + b + 1, a + 2 * b].mean((0, 1)) for b in (0, 1) for a in (0, 1)
        ]
    torch.testing.assert_close(out[2, 3, : side * side], torch.stack(reads))


@pytest.mark.paper("ConViT (GPSA)", "works_when")
def test_rows_sum_to_one_and_gates_at_their_ends_leave_one_kind() -> None:
    layer = mixer("gpsa", DIM, heads=HEADS).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
        layer.to_v.weight.copy_(torch.eye(DIM))
        layer.to_out.weight.copy_(torch.eye(DIM))
    ones = torch.ones(1, 15, DIM, dtype=torch.float64)
    torch.testing.assert_close(layer(ones, layout=GRID), ones)  # values that are all alike come out as they are
    x = torch.randn(2, 15, DIM, dtype=torch.float64)
    content, place = weights_of(layer, x, GRID)
    for gate, weights in ((-1e3, content), (1e3, place.unsqueeze(0))):
        with torch.no_grad():
            layer.gate.fill_(gate)
        read = torch.einsum("bhij,bjhd->bihd", weights.expand(2, -1, -1, -1), x.unflatten(-1, (HEADS, WIDTH)))
        torch.testing.assert_close(layer(x, layout=GRID), read.flatten(2), rtol=1e-12, atol=1e-12)


def test_it_lives_on_a_grid_of_two_axes() -> None:
    layer = mixer("gpsa", DIM, heads=HEADS)
    for layout in (None, Grid(3, 5, 1)):
        with pytest.raises(ValueError, match="grid of 2 axes"):
            layer(torch.randn(1, 15, DIM), layout=layout)


def test_other_weights_begin_small() -> None:
    layer = mixer("gpsa", 288, heads=9)
    for part in (layer.to_q, layer.to_k, layer.to_out):
        assert 0.019 < part.weight.std() < 0.021
