"""Mechanisms of several attentions (HiLo, agents) and on grids, against plain definitions of their own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.support.counted_work import largest, work
from torch import Tensor, nn
from torch.nn import functional as F

from foveate import Grid, attend, causal, key_padding, relative_table
from foveate.catalogue.registry import mixer
from foveate.mixers.exact_io.grid_windows import window_attention, windowed
from foveate.mixers.lowrank_pool.agent import AgentAttention, AgentCore
from foveate.mixers.multiscale_window.hilo import HiLo
from foveate.mixers.neighborhood.neighborhood import GeneralizedNeighborhoodAttention
from foveate.patterns import window_partition


def heads(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def split(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, bias: Tensor | float = 0.0) -> Tensor:
    """Softmax attention over the pairs in ``seen``; nothing where a row sees no key."""
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias
    if seen is None:
        return torch.softmax(logits, -1) @ v
    return torch.softmax(logits.masked_fill(~seen, -1e300), -1) * seen @ v


def agree(got: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    """Equal values and equal gradients."""
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    upstream = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(x, inputs, upstream, allow_unused=True) for x in (got, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-9)


def shaken(model: nn.Module) -> nn.Module:
    """The model in float64 with no parameter at a special value."""
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


# ---- HiLo and agents --------------------------------------------------------------------------------------


@pytest.mark.paper("HiLo / LITv2", "definition")
@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 1])
@pytest.mark.parametrize(("grid", "window"), [(Grid(5, 7), 2), (Grid(4, 6), 3), (Grid(3, 4, 3), 2), (Grid(13), 4)])
def test_hilo_is_its_formula(alpha: float, grid: Grid, window: int) -> None:
    model, x = HiLo(32, heads=4, window=window, alpha=alpha), heads(2, grid.length, 32)
    shaken(model)
    cell = [tuple(c // window for c in place) for place in itertools.product(*map(range, grid.dims))]
    cells = sorted(set(cell))
    member = torch.tensor([[mine == other for other in cells] for mine in cell])  # (N, W)
    means = (member.double() / member.sum(0)).T @ x
    groups = []
    if model.high is not None:
        q, kv = split(model.high.to_q(x), model.high.heads), model.high.to_kv(x)
        k, v = (split(part, model.high.heads) for part in kv.chunk(2, -1))
        together = (member.double() @ member.double().T).bool()
        groups.append(model.high.to_out(join(plain(q, k, v, together))))
    if model.low is not None:
        q, kv = split(model.low.to_q(x), model.low.heads), model.low.to_kv(means)
        k, v = (split(part, model.low.heads) for part in kv.chunk(2, -1))
        groups.append(model.low.to_out(join(plain(q, k, v))))
    assert (model.low is None) == (alpha == 0) and (model.high is None) == (alpha == 1)
    agree(model(x, layout=grid), torch.cat(groups, -1), x, *model.parameters())


def test_hilo_with_a_window_of_one_is_plain_attention() -> None:
    model, x = shaken(HiLo(32, heads=4, window=1)), heads(2, 35, 32)
    q, kv = split(model.low.to_q(x), 4), model.low.to_kv(x)
    k, v = (split(part, 4) for part in kv.chunk(2, -1))
    agree(model(x, layout=Grid(5, 7)), model.low.to_out(join(plain(q, k, v))), x)


@pytest.mark.paper("Agent Attention", "definition")
@pytest.mark.parametrize("grid", [Grid(8, 6), Grid(5, 7), None])
def test_agent_attention_is_its_formula(grid: Grid | None) -> None:
    model, x = (
        shaken(AgentAttention(32, heads=4, agents=4, bias_side=3)),
        heads(2, 35 if grid is None else grid.length, 32),
    )
    dims = (1, 35) if grid is None else grid.dims
    q, k, v = (split(part, 4) for part in (model.to_q(x), *model.to_kv(x).chunk(2, -1)))
    boxes = (1, 4) if grid is None else (2, 2)
    agents = torch.stack([q[:, :, box].mean(2) for box in pooling(dims, boxes)], 2)
    gather, spread = (
        F.interpolate(bias, dims, mode="bilinear").flatten(2) for bias in (model.gather_bias, model.spread_bias)
    )
    out = plain(q, agents, plain(agents, k, v, bias=gather), bias=spread.transpose(1, 2))
    image = join(v).transpose(1, 2).unflatten(2, dims)
    detail = F.conv2d(image, model.detail.weight, model.detail.bias, padding=1, groups=32)
    expected = model.to_out(join(out) + detail.flatten(2).transpose(1, 2))
    agree(model(x, layout=grid), expected, x, *model.parameters())


def pooling(dims: tuple[int, ...], boxes: tuple[int, ...]) -> list[Tensor]:
    """Tokens of each box of adaptive pooling: from floor(i n / s) to ceil((i + 1) n / s) along each axis."""
    places = torch.arange(math.prod(dims)).view(dims)
    edges = [[slice(i * n // s, -(-(i + 1) * n // s)) for i in range(s)] for n, s in zip(dims, boxes, strict=True)]
    return [places[box].flatten() for box in itertools.product(*edges)]


def test_agents_inside_a_pretrained_model_are_the_authors_formula() -> None:
    q, k, v = heads(1, 4, 24, 8), heads(1, 2, 24, 8), heads(1, 2, 24, 8)
    got = AgentCore(agents=6, flatness=0.3, shortcut=0.075)(q, k, v)
    keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    agents = q.unflatten(2, (6, 4)).mean(3)
    scale = 8**-0.5
    gathered = torch.softmax(scale * agents @ keys.transpose(2, 3), -1) @ values
    out = torch.softmax(scale**0.3 * q @ agents.transpose(2, 3), -1) @ gathered
    agree(got, out + 0.075 * values, q, k, v)


def test_agents_refuse_what_they_cannot_honour() -> None:
    q = torch.randn(1, 2, 9, 8)
    padding = key_padding(torch.ones(1, 9, dtype=torch.bool))
    for wrong in ({"within": causal}, {"within": padding}, {"softcap": 3.0}, {"weights": "sigmoid"}):
        with pytest.raises(ValueError, match="agent"):
            AgentCore(4)(q, q, q, **wrong)
    with pytest.raises(ValueError, match="square"):
        AgentAttention(32, agents=5)
    with pytest.raises(ValueError, match="images and sequences"):
        AgentAttention(32)(torch.randn(1, 8, 32), layout=Grid(2, 2, 2))


# ---- neighborhoods and windows ----------------------------------------------------------------------------


def near(at: int, size: int, kernel: int, dilation: int) -> list[int]:
    """The ``kernel`` nearest places congruent to ``at``, shifted inward at the borders."""
    same = [place for place in range(size) if place % dilation == at % dilation]
    first = min(max(same.index(at) - kernel // 2, 0), len(same) - kernel)
    return same[first : first + kernel]


@pytest.mark.paper("NAT / NATTEN", "definition")
@pytest.mark.paper("NAT / NATTEN", "works_when")
@pytest.mark.paper("DiNAT (DiNA)", "definition")
@pytest.mark.parametrize(
    ("dims", "kernel", "dilation"),
    [
        ((7, 5), 3, 1),
        ((3, 4), 3, 1),
        ((7, 9), (5, 3), (1, 3)),
        ((6, 7), 3, 2),
        ((3, 4, 5), 3, 1),
        ((19,), 5, 3),
        ((6,), 5, 1),
    ],
)
@pytest.mark.parametrize("biased", [True, False])
def test_neighborhoods_are_gathered_neighbours(
    dims: tuple[int, ...], kernel: int | tuple[int, ...], dilation: int | tuple[int, ...], biased: bool
) -> None:
    axes = len(dims)
    name = "neighborhood_attention" if dilation == 1 else "dilated_neighborhood_attention"
    options = {} if dilation == 1 else {"dilation": dilation}
    model = mixer(name, 32, heads=4, kernel=kernel, axes=axes, relative_bias=biased, **options)
    x = heads(2, math.prod(dims), 32)
    shaken(model)
    sides, gaps = (a if isinstance(a, tuple) else (a,) * axes for a in (kernel, dilation))
    q, k, v = (split(layer(x), 4) for layer in (model.to_q, model.to_k, model.to_v))
    rows, places = [], list(itertools.product(*map(range, dims)))
    for row, place in enumerate(places):
        along = [near(*axis) for axis in zip(place, dims, sides, gaps, strict=True)]
        keys = list(itertools.product(*along))
        offsets = [tuple(p - c for p, c in zip(place, key, strict=True)) for key in keys]
        reach = [(side - 1) * gap for side, gap in zip(sides, gaps, strict=True)]
        entries = [tuple(o + r for o, r in zip(offset, reach, strict=True)) for offset in offsets]
        bias: Tensor | float = 0.0
        if biased:
            bias = torch.stack([model.table[(slice(None), *entry)] for entry in entries], -1).unsqueeze(1)
        chosen = torch.tensor([places.index(key) for key in keys])
        rows.append(plain(q[:, :, row : row + 1], k[:, :, chosen], v[:, :, chosen], bias=bias))
    agree(model(x, layout=Grid(*dims)), model.to_out(join(torch.cat(rows, 2))), x, *model.parameters())


def test_a_dilated_neighborhood_as_wide_as_the_grid_is_attention() -> None:
    model, x = mixer("dilated_neighborhood_attention", 32, heads=4, kernel=(5, 7), dilation=1), heads(2, 35, 32)
    shaken(model)
    q, k, v = (split(layer(x), 4) for layer in (model.to_q, model.to_k, model.to_v))
    place = torch.stack(torch.meshgrid(torch.arange(5), torch.arange(7), indexing="ij")).flatten(1)
    offset = place.unsqueeze(2) - place.unsqueeze(1) + torch.tensor([4, 6]).view(2, 1, 1)
    bias = model.table[:, offset[0], offset[1]]
    agree(model(x, layout=Grid(5, 7)), model.to_out(join(plain(q, k, v, bias=bias))), x, *model.parameters())


@pytest.mark.paper("DiNAT (DiNA)", "works_when")
def test_counted_work_of_dilated_neighborhoods_is_linear() -> None:
    model, counted = mixer("dilated_neighborhood_attention", 16, heads=2, kernel=3, dilation=2), []
    for grid in (Grid(32, 32), Grid(64, 32), Grid(128, 32)):
        counted.append(work(lambda: model(torch.randn(1, grid.length, 16), layout=grid), "tiles"))  # noqa: B023
    assert 1.7 < counted[1] / counted[0] < 2.3 and 1.7 < counted[2] / counted[1] < 2.3


@pytest.mark.paper("NAT / NATTEN", "definition")
def test_neighborhoods_are_of_seven_by_seven_and_their_biases_start_small() -> None:
    model = mixer("neighborhood_attention", 512, heads=64)
    assert model.table.shape == (64, 13, 13) and 0.018 < model.table.std() < 0.022


@pytest.mark.paper("NAT / NATTEN", "works_when")
def test_neighborhoods_hold_no_matrix_of_all_pairs() -> None:
    model, grid = mixer("neighborhood_attention", 32, heads=4, kernel=5), Grid(64, 49)
    x = torch.randn(1, grid.length, 32, requires_grad=True)
    assert largest(lambda: model(x, layout=grid)) < grid.length**2 // 8


def test_a_neighborhood_of_the_whole_grid_is_attention_and_a_stride_of_the_kernel_is_windows() -> None:
    q, k, v = heads(1, 4, 48, 8), heads(1, 2, 48, 8), heads(1, 2, 48, 8)
    grid = Grid(6, 8)
    whole = GeneralizedNeighborhoodAttention.as_core(kernel=(6, 8), stride=1)(q, k, v, layout=grid)
    torch.testing.assert_close(whole, attend(q, k, v))
    blocked = GeneralizedNeighborhoodAttention.as_core(kernel=(3, 4), stride=(3, 4))(q, k, v, layout=grid)
    torch.testing.assert_close(blocked, attend(q, k, v, window_partition((3, 4)), layout=grid))


def swin(q: Tensor, k: Tensor, v: Tensor, dims: tuple[int, int], side: int, shift: int, table: Tensor) -> Tensor:
    """Shifted windows as Swin's eager code has them, for a grid of whole windows: roll, cut, mask, join, roll."""
    height, width = dims

    def cut(x: Tensor) -> Tensor:
        image = x.unflatten(2, dims).roll((-shift, -shift), (2, 3))
        windows = image.unflatten(3, (-1, side)).unflatten(2, (-1, side)).transpose(3, 4)
        return windows.flatten(4, 5).flatten(2, 3)  # (B, H, windows, L, D)

    zone = torch.zeros(dims, dtype=torch.long)
    edges = (slice(0, -side), slice(-side, -shift or None), slice(-shift, None))
    if shift:
        for number, (rows, columns) in enumerate(itertools.product(edges, edges)):
            zone[rows, columns] = number
    zone = zone.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2).flatten(2).flatten(0, 1)
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    offset = place.unsqueeze(2) - place.unsqueeze(1) + side - 1
    bias = table[:, offset[0], offset[1]].unsqueeze(1)
    out = plain(cut(q), cut(k), cut(v), zone.unsqueeze(2) == zone.unsqueeze(1), bias)
    out = out.unflatten(3, (side, side)).unflatten(2, (height // side, width // side)).transpose(3, 4)
    return out.flatten(4, 5).flatten(2, 3).roll((shift, shift), (2, 3)).flatten(2, 3)


@pytest.mark.paper("FlashWindowAttention", "definition")
@pytest.mark.parametrize(("dims", "side", "shift"), [((6, 9), 3, 1), ((8, 8), 4, 2), ((4, 6), 2, 0), ((5, 5), 5, 2)])
def test_windows_equal_swin(dims: tuple[int, int], side: int, shift: int) -> None:
    n = math.prod(dims)
    q, k, v = heads(2, 4, n, 8), heads(2, 4, n, 8), heads(2, 4, n, 8)
    table = heads(4, 2 * side - 1, 2 * side - 1)
    expected = swin(q, k, v, dims, side, shift, table)
    agree(windowed(q, k, v, Grid(*dims), side, shift=shift, table=table), expected, q, k, v, table)


@pytest.mark.parametrize(
    ("dims", "window", "shift"),
    [((5, 7), 3, 1), ((7, 8), (2, 5), (0, 4)), ((4, 5, 6), 2, 1), ((11,), 4, 3), ((3, 3), 7, 0)],
)
def test_the_two_forms_of_windows_agree_on_any_grid(
    dims: tuple[int, ...], window: int | tuple[int, ...], shift: int | tuple[int, ...]
) -> None:
    grid, sides = Grid(*dims), window if isinstance(window, tuple) else (window,) * len(dims)
    q, k, v = heads(2, 4, grid.length, 8), heads(2, 2, grid.length, 8), heads(2, 1, grid.length, 8)
    table = heads(4, *(2 * side - 1 for side in sides))
    bias = relative_table(table, grid.dims)
    expected = attend(q, k, v, window_partition(window, shift), bias=bias, layout=grid, impl="reference")
    agree(windowed(q, k, v, grid, window, shift=shift, table=table), expected, q, k, v, table)


def test_window_attention_refuses_labels_of_other_windows() -> None:
    q = torch.randn(6, 2, 9, 8)
    with pytest.raises(ValueError, match="windows"):
        window_attention(q, q, q, labels=torch.zeros(4, 9, dtype=torch.long))


def test_grid_mixers_ask_for_a_grid() -> None:
    for name in ("neighborhood_attention", "flash_window_attention", "hilo"):
        with pytest.raises(ValueError, match=r"layout=Grid\(height, width\)"):
            mixer(name, 32, heads=4)(torch.randn(1, 36, 32))
