"""Layouts: where tokens live, and the order in which local patterns on them become dense tiles."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from foveate.counts import whole_numbers
from foveate.plain import remembered, traced


@dataclass(frozen=True, eq=False)  # or layouts that hold tensors would all be equal: they have no fields of this class
class Layout:
    """Base of all layouts. A layout has a number of tokens, coordinates for each, and a tile order."""

    @property
    def length(self) -> int | None:
        """Number of tokens, or None where any length fits."""
        return None

    @property
    def num_axes(self) -> int:
        return 0

    @property
    def tiles_alike(self) -> bool:
        """Whether every tile of the tile order is its first token plus offsets common to all tiles."""
        return True

    def coordinates(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Coordinates of each position along each axis (none for a plain sequence)."""
        return ()

    def slots(self, tile: int, device: torch.device | str = "cpu") -> Tensor | None:
        """Token at each slot of the tile order (-1: empty slot), or None for the natural order."""
        return None

    @property
    def packed_lengths(self) -> tuple[int, ...] | None:
        """How many tokens each of several sequences, clouds or graphs has, of those laid end to end."""
        return None

    @property
    def batches(self) -> int:
        """Number of batch entries it tells apart (1: the same for all)."""
        return 1

    def inverted(self) -> Layout:
        """This layout for what lies inside ``~``."""
        return self

    def check(self, num_keys: int) -> None:
        """Refuse a call whose number of keys is not this layout's number of tokens."""
        if self.length is not None and self.length != num_keys:
            raise ValueError(f"{self} has {self.length} tokens, but k has {num_keys}: pass the layout of the keys")


@dataclass(frozen=True)
class Sequence(Layout):
    """Tokens in a line.

    >>> Sequence(8).length
    8
    """

    num_tokens: int | None = None

    @property
    def length(self) -> int | None:
        return self.num_tokens

    def __str__(self) -> str:
        return f"Sequence({self.num_tokens if self.num_tokens is not None else ''})"


@dataclass(frozen=True, init=False)
class Grid(Layout):
    """Tokens on a grid, flattened row-major: ``Grid(height, width)``, ``Grid(time, height, width)``.

    >>> Grid(4, 6).length
    24
    """

    dims: tuple[int, ...]

    def __init__(self, *dims: int) -> None:
        if not 1 <= len(dims) <= 3 or any(not isinstance(d, int) or d < 1 for d in dims):
            raise ValueError(f"Grid takes one to three positive sizes, as in Grid(56, 56); got {dims}")
        object.__setattr__(self, "dims", tuple(dims))

    @property
    def length(self) -> int:
        return math.prod(self.dims)

    @property
    def num_axes(self) -> int:
        return len(self.dims)

    def coordinates(self, positions: Tensor) -> tuple[Tensor, ...]:
        coordinates = []
        for axis in range(len(self.dims)):
            below = math.prod(self.dims[axis + 1 :])
            coordinates.append(positions // below % self.dims[axis])
        return tuple(coordinates)

    def positions(self, coordinates: Iterable[Tensor]) -> Tensor:
        """Position of each token from its coordinates; the inverse of :meth:`coordinates`."""
        total, *finer = coordinates
        for coordinate, size in zip(finer, self.dims[1:], strict=True):
            total = total * size + coordinate
        return total

    def slots(self, tile: int, device: torch.device | str = "cpu") -> Tensor | None:
        return patch_slots(self.dims, patch_shape(tile, len(self.dims))).to(device)

    def __str__(self) -> str:
        return f"Grid({', '.join(map(str, self.dims))})"


@dataclass(frozen=True, init=False)
class Packed(Layout):
    """Several sequences laid end to end; no token sees another sequence.

    >>> Packed([3, 5]).length
    8
    """

    lengths: tuple[int, ...]

    def __init__(self, lengths: list[int] | tuple[int, ...]) -> None:
        object.__setattr__(self, "lengths", whole_numbers("lengths of packed sequences", lengths))

    @property
    def length(self) -> int:
        return sum(self.lengths)

    @property
    def packed_lengths(self) -> tuple[int, ...]:
        return self.lengths

    def __str__(self) -> str:
        return f"Packed({list(self.lengths)})"


@dataclass(frozen=True, eq=False)
class Points(Layout):
    """Tokens at points of space: ``Points(coords)``, coords (N, 2) or (N, 3); tiles follow a Morton curve.

    >>> Points(torch.rand(10, 3)).length
    10

    With coords (B, N, axes) every batch entry has a cloud of its own; with ``lengths`` clouds lie end to end in N, as
    the sequences of ``Packed`` do, and no token sees another cloud:

    >>> Points(torch.rand(4, 10, 3)).batches, Points(torch.rand(10, 3), lengths=[3, 7]).packed_lengths
    (4, (3, 7))
    """

    coords: Tensor
    lengths: tuple[int, ...] | list[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.coords, Tensor):
            raise TypeError(f"Points takes a tensor of coordinates (N, axes); got {type(self.coords).__name__}")
        shape = tuple(self.coords.shape)
        if len(shape) not in (2, 3) or not self.coords.is_floating_point():
            raise ValueError(f"Points takes float coordinates (N, axes) or (B, N, axes); got {shape}")
        if self.lengths is not None:
            object.__setattr__(self, "lengths", whole_numbers("lengths of clouds", self.lengths))
            if len(shape) != 2 or sum(self.lengths) != shape[0]:
                raise ValueError(
                    f"lengths of clouds laid end to end add up to N of coordinates (N, axes); got {list(self.lengths)}"
                    f" for {shape}"
                )
        if traced(self.coords):
            return
        if not bool(self.coords.isfinite().all()):
            wrong = int((~self.coords.isfinite()).any(-1).sum())
            count = math.prod(shape[:-1])
            raise ValueError(f"Points takes finite coordinates; {wrong} of {count} points have NaN or inf")

    @property
    def length(self) -> int:
        return self.coords.shape[-2]

    @property
    def num_axes(self) -> int:
        return self.coords.shape[-1]

    @property
    def packed_lengths(self) -> tuple[int, ...] | None:
        return None if self.lengths is None else tuple(self.lengths)

    @property
    def batches(self) -> int:
        return self.coords.shape[0] if self.is_batched else 1

    @property
    def is_batched(self) -> bool:
        """Whether every batch entry has a cloud, and an order, of its own."""
        return self.coords.dim() == 3

    @property
    def tiles_alike(self) -> bool:
        return False

    def entry(self, batch: int) -> Points:
        """The cloud of one batch entry."""
        return Points(self.coords[batch if self.batches > 1 else 0]) if self.is_batched else self

    def coordinates(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Of one cloud; a position has no coordinates where clouds differ by batch entry: see :meth:`place_of`."""
        return () if self.is_batched else self.place_of(0, positions)

    def place_of(self, batch: Tensor | int, positions: Tensor) -> tuple[Tensor, ...]:
        """Coordinates along each axis of positions of batch entries (broadcasting)."""
        axes = self.coords.to(positions.device).unbind(-1)
        if not self.is_batched:
            return tuple(axis[positions] for axis in axes)
        return tuple(axis[batch if self.batches > 1 else 0, positions] for axis in axes)

    def slots(self, tile: int, device: torch.device | str = "cpu") -> Tensor | None:
        if self.is_batched:
            return None
        return pad_slots(morton_index(self), tile).to(device)

    def __str__(self) -> str:
        clouds = "" if self.lengths is None else f", lengths={list(self.lengths)}"
        return f"Points({' x '.join(map(str, self.coords.shape))}{clouds})"


def morton_index(points: Points) -> Tensor:
    """Tokens along a Morton curve, cloud after cloud: (N,), or (B, N) of clouds that differ by batch entry."""
    coords = points.coords.detach().cpu()
    if coords.dim() == 3:
        clouds = [morton_order(cloud) for cloud in coords]
        return torch.stack(clouds) if clouds else torch.zeros(coords.shape[:2], dtype=torch.long)
    clouds = coords.split(list(points.packed_lengths or (len(coords),)))
    firsts = [0, *accumulate(map(len, clouds))]
    return torch.cat([first + morton_order(cloud) for first, cloud in zip(firsts, clouds, strict=False)])


def pad_slots(slots: Tensor, tile: int) -> Tensor:
    """Slots padded with empty ones (-1) to whole tiles."""
    return torch.nn.functional.pad(slots, (0, -slots.numel() % tile), value=-1)


def patch_shape(tile: int, num_axes: int) -> tuple[int, ...]:
    """The most nearly cubic box of ``tile`` tokens: 64 is 8 x 8 or 4 x 4 x 4; last axes get longer sides."""
    sides = [1] * num_axes
    axis = num_axes - 1
    while math.prod(sides) < tile:
        sides[axis] *= 2
        axis = (axis - 1) % num_axes
    return tuple(sides)


@remembered(64)
def patch_slots(dims: tuple[int, ...], patch: tuple[int, ...]) -> Tensor:
    """Tokens patch by patch; patches that hang over the border keep empty slots to stay aligned."""
    counts = [-(-size // side) for size, side in zip(dims, patch, strict=True)]
    padded = torch.arange(math.prod(dims), device="cpu").view(dims)
    for axis, (size, side, count) in enumerate(zip(dims, patch, counts, strict=True)):
        filler = list(padded.shape)
        filler[axis] = count * side - size
        padded = torch.cat([padded, padded.new_full(filler, -1)], dim=axis)
    split = [n for pair in zip(counts, patch, strict=True) for n in pair]
    num_axes = len(dims)
    outer, inner = range(0, 2 * num_axes, 2), range(1, 2 * num_axes, 2)
    return padded.view(split).permute(*outer, *inner).reshape(-1).contiguous()


def morton_order(coords: Tensor, bits: int = 16) -> Tensor:
    """Order of points along a Morton (Z) curve: near in the order is near in space."""
    if not len(coords):
        return torch.zeros(0, dtype=torch.long, device="cpu")
    low, high = coords.amin(0), coords.amax(0)
    cells = ((coords - low) / (high - low).clamp_min(1e-12) * (2**bits - 1)).long()
    num_axes = coords.shape[1]
    code = torch.zeros(coords.shape[0], dtype=torch.long, device="cpu")
    for bit in range(bits):
        for axis in range(num_axes):
            code |= (cells[:, axis] >> bit & 1) << (bit * num_axes + axis)
    return torch.argsort(code, stable=True)
