"""Selective scans along several paths: both ways, across images and videos, along zigzags."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate.catalogue.registry import register
from foveate.layouts.orders import (
    Order,
    axes_order,
    bidirectional,
    cross_scan,
    reverse,
    scan_orders,
    spatio_temporal,
    zigzag,
)
from foveate.mixers.base import Mixer
from foveate.mixers.grid import require_grid
from foveate.mixers.recurrent_ssm.mamba import Branch, Mamba, SelectiveScan
from foveate.mixers.stateful import Lengths, laid_end_to_end
from foveate.patterns import Grid, Layout
from foveate.patterns import Sequence as Line


class ScanMixer(Mixer):
    """A gated block around several passes over the tokens, each along an order of its own, which are added.

    A mechanism says which ``orders``; it may change the channels ``before`` they are scanned and what the passes
    say ``after``, and leave the ``gate`` out.
    """

    def __init__(self, dim: int, expand: int, *, gate: bool = True, causal: bool = False) -> None:
        super().__init__(dim, causal=causal)
        if expand < 1:
            raise ValueError(f"expand is how many times the width is scanned, at least once; got {expand}")
        self.inner = expand * dim
        self.to_in = nn.Linear(dim, (1 + gate) * self.inner, bias=False)
        self.to_out = nn.Linear(self.inner, dim, bias=False)
        self.passes = nn.ModuleList()  # of Branch or SelectiveScan, which a mechanism appends

    def orders(self, layout: Layout) -> Sequence[Order]:
        """The order of each pass, for tokens that live on ``layout``."""
        raise NotImplementedError

    def before(self, u: Tensor, layout: Layout) -> Tensor:
        return u

    def after(self, y: Tensor) -> Tensor:
        return y

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        if padding is not None:
            x = x.masked_fill(~padding.unsqueeze(-1), 0)  # a convolution would read on
        flat, key_mask, lengths = laid_end_to_end(x, padding, layout)
        place = layout if isinstance(layout, Grid) else Line(flat.shape[1])
        u, *gate = self.to_in(flat).split(self.inner, dim=-1)
        y = self.after(self.scanned(self.before(u, place), place, lengths, key_mask))
        return self.to_out(y * silu(gate[0]) if gate else y).reshape(x.shape)

    def scanned(self, u: Tensor, place: Layout, lengths: Lengths, key_mask: Tensor | None) -> Tensor:
        """The sum of all passes over u (B, N, channels)."""
        orders = self.orders(place)
        runs = [
            partial(self.walk, each, order, lengths, key_mask) for each, order in zip(self.passes, orders, strict=True)
        ]
        return scan_orders(runs, u, orders)

    def walk(self, run: nn.Module, order: Order, lengths: Lengths, key_mask: Tensor | None, u: Tensor) -> Tensor:
        """One pass over u, which is in that order already; packed documents are walked in their own order."""
        backwards = lengths is not None and not order.is_identity
        lengths = lengths[::-1] if lengths is not None and backwards else lengths
        return run(u, lengths=lengths, key_mask=None if key_mask is None else order.apply(key_mask)).out


@register(
    "audio_mamba",
    papers=("AuM (Audio Mamba)",),
    formula="out = W ((scan(u) + reverse(scan'(reverse(u)))) ⊙ silu(z))",
    supports={"noncausal", "padding", "packed"},
    notes=(
        "The block is Vision Mamba's (2401.09417), the paper's variant Bi-Bi. The authors' code halves the sum of the "
        "scans, the paper does not. Padding lies at the ends of a sequence, as with mamba."
    ),
)
class BidirectionalMamba(ScanMixer):
    """A gated block around one scan forwards and one backwards, each with its own convolution and parameters.

    A class token belongs in the middle, where neither scan has forgotten much: see :func:`insert_middle`.

    >>> mixer = BidirectionalMamba(64)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 2,
        state: int = 16,
        conv: int = 4,
        rank: int | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, expand, causal=causal)
        rank = rank or -(-dim // 16)
        self.passes.extend(Branch(self.inner, state=state, conv=conv, rank=rank) for _ in range(2))

    def orders(self, layout: Layout) -> Sequence[Order]:
        return bidirectional(layout)


def insert_middle(x: Tensor, token: Tensor) -> tuple[Tensor, int]:
    """Tokens x (B, N, C) with one more (C,) in their middle, and where it is.

    >>> x, place = insert_middle(torch.zeros(1, 5, 2), torch.ones(2))
    >>> x[0, :, 0], place
    (tensor([0., 0., 1., 0., 0., 0.]), 2)
    """
    place = x.shape[1] // 2
    return torch.cat([x[:, :place], token.expand(x.shape[0], 1, -1), x[:, place:]], dim=1), place


@register(
    "videomamba",
    papers=("VideoMamba (ST-SSM)",),
    formula="out = W ((scan(u) + reverse(scan'(reverse(u)))) ⊙ silu(z)), u frame after frame",
    supports={"noncausal", "padding", "grid"},
)
class VideoMamba(BidirectionalMamba):
    """Scans of a video forwards and backwards, in space and time at once.

    ``first`` says which is walked first: "space", frame after frame, or "time", pixel after pixel.

    >>> mixer = VideoMamba(64)
    >>> mixer(torch.randn(2, 60, 64), layout=Grid(3, 4, 5)).shape
    torch.Size([2, 60, 64])
    """

    grids: ClassVar[tuple[Layout, ...]] = (Grid(3, 4, 3), Grid(2, 5, 7))

    def __init__(
        self,
        dim: int,
        *,
        first: str = "space",
        expand: int = 2,
        state: int = 16,
        conv: int = 4,
        rank: int | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, expand=expand, state=state, conv=conv, rank=rank, causal=causal)
        if first not in ("space", "time"):
            raise ValueError(f'first is "space", frame after frame, or "time", pixel after pixel; got {first!r}')
        self.first = first

    def check(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> None:
        super().check(x, context, layout, padding)
        require_grid(self.row.name, layout, 3)

    def orders(self, layout: Layout) -> Sequence[Order]:
        assert isinstance(layout, Grid)
        space, time, *backwards = spatio_temporal(layout)
        return (space, backwards[0]) if self.first == "space" else (time, backwards[1])


@register(
    "vmamba",
    papers=("VMamba / SS2D",),
    formula="out = W (norm(Σ_d undo_d(scan_d(order_d(silu(conv2d(u)))))) ⊙ silu(z)), d: rows, columns, reverses",
    supports={"noncausal", "padding", "grid"},
    notes="The gated block of the paper's first version; gate=False is that of its later ones.",
)
class VMamba(ScanMixer):
    """SS2D: an image scanned along its rows, its columns, and both backwards, so that every pixel sees all others.

    ``axes`` is 2, or 3 for videos, which are scanned in six directions; ``conv`` is the side of the convolution.
    ``gate=False`` is the block of the paper's later versions, whose convolution has no bias either.

    >>> mixer = VMamba(64)
    >>> mixer(torch.randn(2, 42, 64), layout=Grid(6, 7)).shape
    torch.Size([2, 42, 64])
    """

    grids: ClassVar[tuple[Layout, ...]] = (Grid(5, 7), Grid(8, 3))

    def __init__(
        self,
        dim: int,
        *,
        axes: int = 2,
        expand: int = 2,
        state: int = 16,
        conv: int = 3,
        rank: int | None = None,
        gate: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, expand, gate=gate, causal=causal)
        if axes not in (2, 3):
            raise ValueError(f"axes is 2 for images or 3 for videos; got {axes}")
        if conv < 1 or conv % 2 == 0:
            raise ValueError(f"the convolution has an odd number of pixels a side; got conv={conv}")
        self.axes = axes
        rank = rank or -(-dim // 16)
        self.passes.extend(SelectiveScan(self.inner, state, rank) for _ in range(2 * axes))
        kind = nn.Conv2d if axes == 2 else nn.Conv3d
        self.conv = kind(self.inner, self.inner, conv, padding=conv // 2, groups=self.inner, bias=gate)
        self.norm = nn.LayerNorm(self.inner)

    def check(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> None:
        super().check(x, context, layout, padding)
        require_grid(self.row.name, layout, self.axes)

    def before(self, u: Tensor, layout: Layout) -> Tensor:
        assert isinstance(layout, Grid)
        return silu(self.conv(u.mT.unflatten(2, layout.dims))).flatten(2).mT

    def after(self, y: Tensor) -> Tensor:
        return self.norm(y)

    def orders(self, layout: Layout) -> Sequence[Order]:
        assert isinstance(layout, Grid)
        return cross_scan(layout)


@register(
    "zigma",
    papers=("ZigMa",),
    formula="out = undo(mamba(zigzag_layer(x))), one of 8 zigzags a layer",
    supports={"noncausal", "padding", "grid"},
    notes=(
        "Videos are factorised as in the paper: two layers zigzag through each frame, the third follows each pixel "
        "through time. Later versions of the paper are called 'ZigMa: A DiT-style Zigzag Mamba Diffusion Model'."
    ),
)
class ZigMa(Mixer):
    """Mamba along a path that turns round at each border, so that no step leaves the neighbourhood.

    ``layer`` is the number of the layer: each takes the next of the eight paths.

    >>> mixers = [ZigMa(64, layer=layer) for layer in range(3)]
    >>> x = torch.randn(2, 42, 64)
    >>> for mixer in mixers:
    ...     x = x + mixer(x, layout=Grid(6, 7))
    """

    grids: ClassVar[tuple[Layout, ...]] = (Grid(5, 7), Grid(2, 4, 5))

    def __init__(
        self,
        dim: int,
        *,
        layer: int = 0,
        expand: int = 2,
        state: int = 16,
        conv: int = 4,
        rank: int | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        if layer < 0:
            raise ValueError(f"layer is the number of the layer, from 0; got {layer}")
        self.layer = layer
        self.mamba = Mamba(dim, expand=expand, state=state, conv=conv, rank=rank)

    def check(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> None:
        super().check(x, context, layout, padding)
        axes = layout.num_axes if isinstance(layout, Grid) and layout.num_axes == 3 else 2
        require_grid(self.row.name, layout, axes)

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        assert isinstance(layout, Grid)
        order, lines = self.path(layout)
        sequences, length = x.shape[0] * lines, x.shape[1] // lines
        key_mask = None if padding is None else order.apply(padding).reshape(sequences, length)
        along = order.apply(x).reshape(sequences, length, self.dim)
        return order.undo(self.mamba(along, padding=key_mask).reshape(x.shape))

    def path(self, grid: Grid) -> tuple[Order, int]:
        """This layer's order, and how many sequences of equal length it falls into."""
        if grid.num_axes == 2:
            return zigzag(grid)[self.layer % 8], 1
        frames, *image = grid.dims
        if self.layer % 3 == 2:  # space, space, time, space, ...
            through = axes_order(grid, (1, 2, 0))
            return (reverse(through) if self.layer // 3 % 2 else through), grid.length // frames
        spatial = self.layer - self.layer // 3
        return each_frame(zigzag(Grid(*image))[spatial % 8], frames), frames


def each_frame(order: Order, frames: int) -> Order:
    """An order of an image, for all images of a video one after another."""
    starts = torch.arange(frames).unsqueeze(1) * len(order)
    return Order((starts + order.index).flatten())


@register(
    "s_mamba",
    papers=("S-Mamba",),
    formula="out = mamba(x) + reverse(mamba'(reverse(x))), a token for each variate",
    supports={"noncausal", "padding", "packed"},
)
class SMamba(Mixer):
    """Two whole Mamba blocks, one over the tokens and one over them reversed; a token is a variate's whole series.

    >>> mixer = SMamba(64)
    >>> mixer(torch.randn(2, 21, 64)).shape
    torch.Size([2, 21, 64])
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 1,
        state: int = 16,
        conv: int = 2,
        rank: int | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        sizes: dict[str, Any] = {"expand": expand, "state": state, "conv": conv, "rank": rank}
        self.forwards, self.backwards = Mamba(dim, **sizes), Mamba(dim, **sizes)

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        flat, key_mask, lengths = laid_end_to_end(x, padding, layout)
        if key_mask is not None:
            flat = flat.masked_fill(~key_mask.unsqueeze(-1), 0)
        out = flat.new_zeros(())
        for mamba, order in zip((self.forwards, self.backwards), bidirectional(Line(flat.shape[1])), strict=True):
            ahead = lengths if lengths is None or order.is_identity else lengths[::-1]
            seen = None if key_mask is None else order.apply(key_mask)
            out = out + order.undo(mamba.run(order.apply(flat), None, ahead, seen).out)
        return out.reshape(x.shape)
