"""Dilated neighborhood attention against a gather written out, on lines, images and videos."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from foveate import Grid
from foveate.catalogue.registry import mixer
from foveate.counting import count_operations

HEADS = 2


def model(axes: int, kernel: int, dilation: int, **options: bool) -> nn.Module:
    made = mixer(
        "dilated_neighborhood_attention", 8, heads=HEADS, kernel=kernel, dilation=dilation, axes=axes, **options
    )
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made.double()


def near(place: int, side: int, kernel: int, dilation: int) -> list[int]:
    """The kernel nearest places of the same residue, shifted inwards at a border."""
    alike = list(range(place % dilation, side, dilation))
    at = alike.index(place)
    first = min(max(at - kernel // 2, 0), len(alike) - kernel)
    return alike[first : first + kernel]


def gathered(dina: nn.Module, x: Tensor, grid: Grid, kernel: int, dilation: int) -> Tensor:
    batch, dims = x.shape[0], grid.dims
    q, k, v = ((x @ layer.weight.T).view(batch, *dims, HEADS, -1) for layer in (dina.to_q, dina.to_k, dina.to_v))
    reach = (kernel - 1) * dilation
    rows = []
    for place in itertools.product(*map(range, dims)):
        keys = list(itertools.product(*(near(p, side, kernel, dilation) for p, side in zip(place, dims, strict=True))))
        at = (slice(None), *torch.tensor(keys).unbind(1))
        logits = torch.einsum("bhd,bjhd->bhj", q[(slice(None), *place)], k[at]) / q.shape[-1] ** 0.5
        steps = torch.tensor([[p - j + reach for p, j in zip(place, key, strict=True)] for key in keys])
        logits = logits + dina.table[(slice(None), *steps.unbind(1))]
        rows.append(torch.einsum("bhj,bjhd->bhd", torch.softmax(logits, -1), v[at]).flatten(1))
    return torch.stack(rows, 1) @ dina.to_out.weight.T


@pytest.mark.paper("DiNAT (DiNA)", "works_when")
@pytest.mark.parametrize(
    ("dims", "kernel", "dilation"),
    [((17,), 3, 4), ((11,), 5, 2), ((9, 11), 3, 3), ((7, 8), 3, 2), ((5, 6, 7), 3, 1), ((6, 7, 6), 3, 2)],
)
def test_it_is_a_gather_with_borders_shifted_and_biases(dims: tuple[int, ...], kernel: int, dilation: int) -> None:
    grid, dina = Grid(*dims), model(len(dims), kernel, dilation)
    x = torch.randn(2, grid.length, 8, dtype=torch.float64, requires_grad=True)
    out, expected = dina(x, layout=grid), gathered(dina, x, grid, kernel, dilation)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    leaves, towards = [x, *dina.parameters()], torch.randn_like(out)
    grads, wanted = (torch.autograd.grad(y, leaves, towards) for y in (out, expected))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-8)


@pytest.mark.paper("DiNAT (DiNA)", "works_when")
@pytest.mark.parametrize(("dims", "dilation"), [((7, 7), 1), ((5, 5, 5), 1), ((9,), 1)])
def test_a_kernel_as_wide_as_the_side_is_full_attention(dims: tuple[int, ...], dilation: int) -> None:
    grid, dina = Grid(*dims), model(len(dims), dims[0], dilation, relative_bias=False)
    x = torch.randn(2, grid.length, 8, dtype=torch.float64)
    q, k, v = (
        (x @ layer.weight.T).view(2, -1, HEADS, 4).transpose(1, 2) for layer in (dina.to_q, dina.to_k, dina.to_v)
    )
    dense = (torch.softmax(q @ k.mT / 2, -1) @ v).transpose(1, 2).flatten(2) @ dina.to_out.weight.T
    torch.testing.assert_close(dina(x, layout=grid), dense, rtol=1e-9, atol=1e-9)


@pytest.mark.paper("DiNAT (DiNA)", "works_when")
def test_work_is_linear_in_tokens() -> None:
    for side in (12, 24):
        with torch.no_grad(), count_operations() as counted:
            model(2, 3, 2)(torch.randn(1, side**2, 8, dtype=torch.float64), layout=Grid(side, side))
        assert counted.pairs == HEADS * 9 * side**2


@pytest.mark.paper("DiNAT (DiNA)", "works_when")
def test_a_block_that_alternates_dilations_learns_what_lies_four_steps_away() -> None:
    """Each token is to name the sum of two others, four and two steps away: no undilated layer sees the farther."""
    grid = Grid(12, 12)

    def loss_of(dilations: tuple[int, int]) -> float:
        torch.manual_seed(4)
        layers = nn.ModuleList(
            mixer("dilated_neighborhood_attention", 16, heads=4, kernel=3, dilation=dilation) for dilation in dilations
        )
        read, write = nn.Linear(1, 16), nn.Linear(16, 1)
        parameters = [*layers.parameters(), *read.parameters(), *write.parameters()]
        optimiser = torch.optim.Adam(parameters, lr=1e-2)
        for _ in range(80):
            image = torch.randn(8, 12, 12)
            wanted = image.roll(4, 1) + image.roll(2, 2)
            h = read(image.flatten(1).unsqueeze(-1))
            for layer in layers:
                h = h + layer(h, layout=grid)
            loss = (write(h).view_as(image) - wanted)[:, 4:, 4:].square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return float(loss.detach())

    dilated, plain = loss_of((2, 4)), loss_of((1, 1))
    assert dilated < 0.6 * plain
