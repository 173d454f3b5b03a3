"""Deformable attention's sampling: features read off a grid, bilinearly, where a small network points.

Positions are (row, column) in tokens: (0, 0) is the centre of the first token, (h - 1, w - 1) that of the last, and
what lies beyond the grid is zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, grid_sample

from foveate.patterns import Grid
from foveate.precision import accum_dtype, to_accum


class Sampled(NamedTuple):
    """Features (B, S, C) and the positions (B, groups, S, 2) they were read at."""

    features: Tensor
    positions: Tensor


def sample_bilinear(x: Tensor, positions: Tensor, grid: Grid) -> Tensor:
    """Features of tokens x (B, N, C) of an image at positions (B, groups, S, 2), (B, S, C), in time linear in N + S.

    >>> x = torch.arange(6.0).view(1, 6, 1)  # an image of 2 x 3
    >>> sample_bilinear(x, torch.tensor([[[[0.0, 1.0], [0.5, 1.5], [0.0, 2.5]]]]), Grid(2, 3)).flatten()
    tensor([1., 3., 1.])

    Each group of channels is read at positions of its own. Differentiable in both; arithmetic is at least float32.
    Raises ValueError where x, positions and grid do not belong together.
    """
    _require_image(grid)
    if x.dim() != 3 or x.shape[1] != grid.length:
        raise ValueError(f"x is (B, {grid.length}, C) on {grid}; got {tuple(x.shape)}")
    if positions.dim() != 4 or positions.shape[0] != x.shape[0] or positions.shape[3] != 2:
        raise ValueError(f"positions are ({x.shape[0]}, groups, S, 2), rows and columns; got {tuple(positions.shape)}")
    groups = positions.shape[1]
    if groups < 1 or x.shape[2] % groups:
        raise ValueError(f"groups of positions divide channels; got {groups} for {x.shape[2]}")
    images = x.mT.unflatten(1, (groups, -1)).flatten(0, 1).unflatten(-1, grid.dims)  # (B G, C / G, h, w)
    read = _read(images, positions.flatten(0, 1))  # (B G, C / G, S)
    return read.unflatten(0, (-1, groups)).flatten(1, 2).mT


def _read(images: Tensor, positions: Tensor) -> Tensor:
    """Images (n, c, h, w) at positions (n, S, 2): (n, c, S) in their dtype."""
    wide = accum_dtype(images, positions)
    sides = torch.tensor(images.shape[2:], dtype=wide, device=images.device)
    places = ((2 * positions.to(wide) + 1) / sides - 1).flip(-1).unsqueeze(1)  # x before y, edges at -1 and 1
    return grid_sample(images.to(wide), places, align_corners=False).squeeze(2).to(images.dtype)


def _require_image(grid: Grid) -> None:
    if not isinstance(grid, Grid) or grid.num_axes != 2:
        raise ValueError(f"positions are rows and columns of an image: pass Grid(height, width); got {grid}")


class DeformableSampling(nn.Module):
    """Deformable attention's keys and values: features at a coarse grid of points that the queries move.

    One point for every ``stride`` x ``stride`` tokens. A depthwise convolution of ``kernel`` x ``kernel`` over the
    queries' channels, LayerNorm, GELU and a linear map to (row, column), shared by ``groups`` groups of channels, say
    by how far each point moves: ``offset_range * tanh`` in units of half a step between points. With
    ``offset_range=None`` it moves by as many halves of the image as the network says, and stays inside it.

    >>> sampling = DeformableSampling(8, groups=2, stride=2)
    >>> x, grid = torch.randn(1, 35, 8), Grid(5, 7)
    >>> features, positions = sampling(x, x, grid)  # from features x and queries x
    >>> features.shape, positions.shape
    (torch.Size([1, 12, 8]), torch.Size([1, 2, 12, 2]))

    Keys and values are then projections of the features, and ``SampledBias`` is what positions add to the logits.
    Padding is half a kernel, none where kernel and stride are equal. As in the authors' code point i of n along a
    side of h tokens starts at (i + 1/2) (h - 1) / (n - 1), half a step further than the paper's; a single one in the
    middle.

    Paper: Xia et al., Vision Transformer with Deformable Attention, arXiv 2201.00520, section 3.2.
    """

    def __init__(
        self, dim: int, groups: int = 1, *, kernel: int = 5, stride: int = 1, offset_range: float | None = 2.0
    ) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"groups divide the channels; got {groups} for {dim}")
        if min(kernel, stride) < 1:
            raise ValueError(f"kernel and stride are at least 1; got {kernel} and {stride}")
        if offset_range is not None and offset_range < 0:
            raise ValueError(f"offset_range is at least 0, or None for no bound but the image; got {offset_range}")
        self.groups, self.offset_range = groups, offset_range
        width, padding = dim // groups, kernel // 2 if kernel != stride else 0
        self.conv = nn.Conv2d(width, width, kernel, stride, padding, groups=width)
        self.norm = nn.LayerNorm(width)
        self.to_offset = nn.Linear(width, 2, bias=False)

    def forward(self, x: Tensor, queries: Tensor, grid: Grid) -> Sampled:
        """Features of x (B, N, C) at the positions that queries (B, N, C) point to."""
        positions = self.positions(queries, grid)
        return Sampled(sample_bilinear(x, positions, grid), positions)

    def positions(self, queries: Tensor, grid: Grid) -> Tensor:
        """Where queries (B, N, C) point to: (B, groups, S, 2)."""
        _require_image(grid)
        batch = queries.shape[0]
        images = queries.mT.unflatten(1, (self.groups, -1)).flatten(0, 1).unflatten(-1, grid.dims)
        if any(size + 2 * pad < side for size, pad, side in zip(grid.dims, *self._reach, strict=True)):
            raise ValueError(f"{grid} is smaller than the kernel {self.conv.kernel_size}: no point fits in")
        moved = self.conv(images)  # (B G, C / G, rows, columns)
        dims = tuple(moved.shape[2:])
        offset = self.to_offset(gelu(self.norm(moved.flatten(2).mT))).unflatten(0, (batch, self.groups))
        offset = to_accum(offset)  # positions have more digits than bfloat16
        start, step, last = reference_points(dims, grid, offset)
        if self.offset_range is None:
            return (start + offset * last / 2).clamp_min(0).minimum(last)
        return start + offset.tanh() * (self.offset_range / 2) * step

    @property
    def _reach(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        padding = self.conv.padding
        assert isinstance(padding, tuple)
        return padding, self.conv.kernel_size


def reference_points(dims: tuple[int, ...], grid: Grid, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where points of ``dims`` rows and columns start on a grid, (S, 2); a step between them; the last token, (2,)."""
    count, side = (torch.tensor(each, dtype=like.dtype, device=like.device) for each in (dims, grid.dims))
    step = (side - 1) / (count - 1).clamp_min(1)
    rows = torch.cartesian_prod(*(torch.arange(n, dtype=like.dtype, device=like.device) for n in dims))
    return torch.where(count > 1, (rows + 0.5) * step, (side - 1) / 2), step, side - 1


class SampledBias(nn.Module):
    """Relative position bias of positions between tokens: a table by distance, read bilinearly.

    ``table`` (heads, 2 h - 1, 2 w - 1) holds a number for each distance along the rows and columns of an image, from
    -(h - 1) to h - 1; query i's bias of a point at p is read at i - p.

    >>> bias = SampledBias(4, Grid(5, 7))
    >>> bias(torch.rand(1, 2, 12, 2)).shape  # 2 groups of 2 heads, 12 points
    torch.Size([1, 4, 35, 12])

    Pass what it returns as ``attend(..., bias=...)``. It takes memory for every pair of a token and a point.

    Paper: Xia et al., Vision Transformer with Deformable Attention, arXiv 2201.00520, section 3.2.
    """

    def __init__(self, heads: int, grid: Grid) -> None:
        super().__init__()
        _require_image(grid)
        self.grid = grid
        self.table = nn.Parameter(torch.empty(heads, *(2 * side - 1 for side in grid.dims)))
        nn.init.trunc_normal_(self.table, std=0.01)

    def forward(self, positions: Tensor) -> Tensor:
        """The bias (B, heads, N, S) of points at positions (B, groups, S, 2)."""
        batch, groups, points, _ = positions.shape
        heads = self.table.shape[0]
        if heads % groups:
            raise ValueError(f"groups of positions divide heads; got {groups} for {heads}")
        at = torch.stack(self.grid.coordinates(torch.arange(self.grid.length, device=positions.device)), dim=1)
        last = torch.tensor(self.grid.dims, device=positions.device) - 1
        distances = (at + last).view(-1, 1, 2) - positions.flatten(0, 1).unsqueeze(1)  # (B G, N, S, 2)
        tables = self.table.unflatten(0, (groups, -1)).repeat(batch, 1, 1, 1)  # (B G, heads / G, ...)
        return _read(tables, distances.flatten(1, 2)).view(batch, heads, self.grid.length, points)
