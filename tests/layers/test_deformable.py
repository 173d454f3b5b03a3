"""Learned sampling positions: bilinear reads, DAT's points and its bias, against loops from the paper's formulas."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm

from foveate import Grid, attend
from foveate.layers.deformable import DeformableSampling, SampledBias, sample_bilinear

DIM, GRID = 6, Grid(5, 7)


def read(image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Σ over whole positions of g(row, r) g(column, c) image[r, c], g(a, b) = max(0, 1 - |a - b|), zero outside."""
    total = torch.zeros(image.shape[2:], dtype=image.dtype)
    for r, c in product(range(image.shape[0]), range(image.shape[1])):
        total = total + (1 - (row - r).abs()).clamp_min(0) * (1 - (column - c).abs()).clamp_min(0) * image[r, c]
    return total


def points_of(layer: DeformableSampling, queries: Tensor, dims: tuple[int, int]) -> Tensor:
    """Positions (groups, S, 2) by the authors' definition, in coordinates from -1 to 1 turned into tokens."""
    width, found = DIM // layer.groups, []
    kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
    for group in range(layer.groups):
        own = queries[:, group * width : (group + 1) * width].T.reshape(1, width, *dims)
        padding = kernel // 2 if kernel != stride else 0
        hidden = conv2d(own, layer.conv.weight, layer.conv.bias, stride, padding, groups=width)
        normed = layer_norm(hidden.permute(0, 2, 3, 1), (width,), layer.norm.weight, layer.norm.bias)
        offsets = gelu(normed) @ layer.to_offset.weight.T  # (1, rows, columns, 2)
        rows, columns = offsets.shape[1:3]
        for i, j in product(range(rows), range(columns)):
            place = []
            for number, count, side, offset in zip((i, j), (rows, columns), dims, offsets[0, i, j], strict=True):
                start = (number + 0.5) / (count - 1) * 2 - 1
                if layer.offset_range is None:
                    unit = (start + offset).clamp(-1, 1)
                else:
                    unit = start + offset.tanh() * layer.offset_range / (count - 1)
                place.append((unit + 1) / 2 * (side - 1))
            found.append(torch.stack(place))
    return torch.stack(found).view(layer.groups, -1, 2)


def shaken(layer: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("groups", [1, 3])
def test_bilinear_reads_weigh_the_four_nearest_tokens(groups: int) -> None:
    x = torch.randn(2, 35, DIM, dtype=torch.float64)
    positions = torch.rand(2, groups, 9, 2, dtype=torch.float64) * torch.tensor([8.0, 10.0]) - 2  # some outside
    found = sample_bilinear(x, positions, GRID)
    width = DIM // groups
    for entry, group, point in product(range(2), range(groups), range(9)):
        own = slice(group * width, (group + 1) * width)
        wanted = read(x[entry, :, own].view(5, 7, width), *positions[entry, group, point])
        torch.testing.assert_close(found[entry, point, own], wanted)


def test_whole_positions_are_the_tokens_themselves_also_on_lines_of_one() -> None:
    for grid in (GRID, Grid(1, 5), Grid(1, 1)):
        x = torch.randn(1, grid.length, 4)
        at = torch.stack(grid.coordinates(torch.arange(grid.length)), dim=1).float()
        torch.testing.assert_close(sample_bilinear(x, at.expand(1, 1, -1, -1), grid), x)


@pytest.mark.parametrize("kernel, stride, groups, offset_range", [(5, 1, 1, 2.0), (3, 2, 3, 5.0), (2, 2, 2, None)])
def test_points_are_moved_by_what_the_network_says(
    kernel: int, stride: int, groups: int, offset_range: float | None
) -> None:
    layer = DeformableSampling(DIM, groups, kernel=kernel, stride=stride, offset_range=offset_range)
    shaken(layer.double())
    x, queries = torch.randn(2, 2, 35, DIM, dtype=torch.float64)
    features, positions = layer(x, queries, GRID)
    for entry in range(2):
        wanted = points_of(layer, queries[entry], (5, 7))
        torch.testing.assert_close(positions[entry], wanted)
        width = DIM // groups
        for group, point in product(range(groups), range(wanted.shape[1])):
            own = slice(group * width, (group + 1) * width)
            told = read(x[entry, :, own].view(5, 7, width), *wanted[group, point])
            torch.testing.assert_close(features[entry, point, own], told)


def test_the_bias_is_the_table_at_the_distance() -> None:
    bias = shaken(SampledBias(4, Grid(3, 4)).double())
    positions = torch.rand(2, 2, 5, 2, dtype=torch.float64) * torch.tensor([3.0, 4.0]) - 0.5
    found = bias(positions)
    for entry, head, token, point in product(range(2), range(4), range(12), range(5)):
        row, column = positions[entry, head // 2, point]
        distance = token // 4 - row + 2, token % 4 - column + 3  # the middle of the table is no distance
        wanted = read(bias.table[head].unsqueeze(-1), *distance)
        torch.testing.assert_close(found[entry, head, token, point], wanted[0])


def test_the_bias_starts_small_and_unbounded_offsets_stay_inside() -> None:
    assert SampledBias(8, Grid(20, 30)).table.std().item() == pytest.approx(0.01, rel=0.1)
    layer = shaken(DeformableSampling(DIM, offset_range=None).double())
    with torch.no_grad():
        layer.norm.weight.fill_(1)
        layer.norm.bias.fill_(0)
        layer.to_offset.weight.copy_(100 * torch.tensor([[1, -1, 1, -1, 1, -1], [1, 1, 1, -1, -1, -1]]))
    positions = layer.positions(torch.randn(2, 35, DIM, dtype=torch.float64), GRID)
    assert positions.amin((0, 1, 2)).tolist() == [0, 0] and positions.amax((0, 1, 2)).tolist() == [4, 6]


def test_attention_to_sampled_points_is_the_papers() -> None:
    """Equations 6 to 8: softmax(q·k~ / √d + bias) over points, k~ and v~ projected from sampled features."""
    heads, width = 2, 3
    sampling, bias = (shaken(each.double()) for each in (DeformableSampling(DIM, 2, stride=2), SampledBias(2, GRID)))
    x = torch.randn(1, 35, DIM, dtype=torch.float64)
    to_q, to_k, to_v = torch.randn(3, DIM, DIM, dtype=torch.float64)
    features, positions = sampling(x, x @ to_q, GRID)
    q, k, v = (
        each.unflatten(-1, (heads, width)).transpose(1, 2) for each in (x @ to_q, features @ to_k, features @ to_v)
    )
    out = attend(q, k, v, bias=bias(positions))
    points = points_of(sampling, (x @ to_q)[0], (5, 7))
    image = x[0].view(5, 7, DIM)
    for head, token in product(range(heads), range(0, 35, 11)):
        own = slice(3 * head, 3 * head + 3)
        seen = [torch.cat([read(image[..., 3 * g : 3 * g + 3], *points[g, s]) for g in range(2)]) for s in range(12)]
        logits = []
        for s, feature in enumerate(seen):
            place = token // 7 - points[head, s, 0] + 4, token % 7 - points[head, s, 1] + 6
            added = read(bias.table[head].unsqueeze(-1), *place)[0]
            logits.append((x[0, token] @ to_q)[own] @ (feature @ to_k)[own] / math.sqrt(width) + added)
        weights = torch.stack(logits).softmax(0)
        wanted = sum(weight * (feature @ to_v)[own] for weight, feature in zip(weights, seen, strict=True))
        torch.testing.assert_close(out[0, head, token], wanted)


def test_gradients_reach_features_queries_and_the_network() -> None:
    layer = shaken(DeformableSampling(4, 2, kernel=3, stride=2).double())
    x, queries = torch.randn(2, 1, 12, 4, dtype=torch.float64, requires_grad=True).unbind(0)
    assert torch.autograd.gradcheck(lambda x, q: layer(x, q, Grid(3, 4)).features, (x, queries))
    layer(x, queries, Grid(3, 4)).features.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_half_precision_keeps_positions_in_single() -> None:
    layer = DeformableSampling(4, stride=2).bfloat16()
    x = torch.randn(1, 35, 4, dtype=torch.bfloat16)
    features, positions = layer(x, x, GRID)
    assert features.dtype == torch.bfloat16 and positions.dtype == torch.float32


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: DeformableSampling(6, 4), "groups divide the channels"),
        (lambda: DeformableSampling(6, stride=0), "at least 1"),
        (lambda: DeformableSampling(6, offset_range=-1), "offset_range"),
        (lambda: DeformableSampling(6)(*torch.randn(2, 1, 24, 6), Grid(2, 3, 4)), "Grid\\(height, width\\)"),
        (lambda: DeformableSampling(6, kernel=4, stride=4)(*torch.randn(2, 1, 6, 6), Grid(2, 3)), "smaller than"),
        (lambda: sample_bilinear(torch.randn(1, 6, 5), torch.zeros(1, 2, 3, 2), Grid(2, 3)), "divide channels"),
        (lambda: sample_bilinear(torch.randn(1, 7, 4), torch.zeros(1, 2, 3, 2), Grid(2, 3)), "x is"),
        (lambda: sample_bilinear(torch.randn(1, 6, 4), torch.zeros(1, 2, 3), Grid(2, 3)), "positions are"),
        (lambda: SampledBias(3, Grid(2, 3))(torch.zeros(1, 2, 4, 2)), "divide heads"),
    ],
)
def test_what_does_not_fit_is_refused(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        call()
