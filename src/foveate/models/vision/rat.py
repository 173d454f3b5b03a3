"""RAT: a U-shaped network that restores images, in the middle of which pixels attend to those of their region."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foveate.attention import attend
from foveate.catalogue.tiers import Preset, model
from foveate.layouts.regions import regions_of
from foveate.mixers.base import join_heads, split_heads
from foveate.mixers.dynamic_sparse.region_attention import region_attention
from foveate.models.vision.pyramid import ConvMlp, PixelNorm
from foveate.patterns import Grid


class SimpleGate(nn.Module):
    """Half of the channels times the other half."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return first * second


class NAFBlock(nn.Module):
    """A convolution block without activations: gates by products, and channels weighted by their means.

    >>> NAFBlock(8)(torch.randn(2, 8, 5, 7)).shape
    torch.Size([2, 8, 5, 7])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = PixelNorm(dim, eps=1e-6), PixelNorm(dim, eps=1e-6)
        self.widen, self.local = nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim)
        self.weigh, self.narrow = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.mlp = nn.Sequential(nn.Conv2d(dim, 2 * dim, 1), SimpleGate(), nn.Conv2d(dim, dim, 1))
        self.gate = SimpleGate()
        self.first_scale, self.second_scale = (nn.Parameter(torch.zeros(1, dim, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(self.local(self.widen(self.first_norm(x))))
        x = x + self.first_scale * self.narrow(y * self.weigh(y.mean((2, 3), keepdim=True)))
        return x + self.second_scale * self.mlp(self.second_norm(x))


class LocalAttention(nn.Module):
    """Multi-head attention among the tokens of a region of any shape, or of windows; logits times heads ** -0.5."""

    def __init__(self, dim: int, heads: int, window: int | None) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid, regions: Tensor) -> Tensor:
        q, k, v = split_heads(self.to_qkv(x), 3 * self.heads).chunk(3, 1)
        scale = self.heads**-0.5
        if self.window is None:
            return self.to_out(join_heads(region_attention(q, k, v, regions, scale=scale)))
        windows = regions_of(grid, (self.window, self.window))
        apart = [
            windows.split(y).unflatten(2, (windows.count, windows.size)).transpose(1, 2).flatten(0, 1)
            for y in (q, k, v)
        ]
        mixed = attend(*apart, scale=scale).unflatten(0, (len(x), windows.count)).transpose(1, 2).flatten(2, 3)
        return self.to_out(join_heads(windows.join(mixed)))


class RegionBlock(nn.Module):
    """Attention inside regions and an MLP, attention inside windows and another, all behind norms."""

    def __init__(self, dim: int, heads: int, window: int, ratio: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in range(4))
        self.attentions = nn.ModuleList(LocalAttention(dim, heads, side) for side in (None, window))
        self.mlps = nn.ModuleList(ConvMlp(dim, ratio * dim) for _ in range(2))
        self.scales = nn.ParameterList(nn.Parameter(torch.zeros(dim)) for _ in range(2))

    def forward(self, x: Tensor, grid: Grid, regions: Tensor) -> Tensor:
        for number, (attention, mlp, scale) in enumerate(zip(self.attentions, self.mlps, self.scales, strict=True)):
            x = x + scale * attention(self.norms[2 * number](x), grid, regions)
            x = x + mlp(self.norms[2 * number + 1](x))
        return x


class RegionGroup(nn.Module):
    """Blocks, a convolution, and what came in."""

    def __init__(self, dim: int, depth: int, heads: int, window: int, ratio: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RegionBlock(dim, heads, window, ratio) for _ in range(depth))
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, image: Tensor, regions: Tensor) -> Tensor:
        grid, tokens = Grid(*image.shape[2:]), image.flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens, grid, regions)
        return image + self.conv(tokens.mT.unflatten(2, grid.dims))


class RAT(nn.Module):
    """Images (B, channels, height, width), and their regions, to restored images."""

    def __init__(
        self,
        channels: int,
        dim: int,
        encoders: Sequence[int],
        decoders: Sequence[int],
        middle: Sequence[int],
        heads: int,
        window: int,
        ratio: int,
    ) -> None:
        super().__init__()
        if len(encoders) != len(decoders):
            raise ValueError(f"there are as many decoders as encoders; got {encoders} and {decoders}")
        self.multiple, self.window = 2 ** len(encoders), window
        self.stem, self.head = nn.Conv2d(channels, dim, 3, padding=1), nn.Conv2d(dim, channels, 3, padding=1)
        widths = [dim * 2**level for level in range(len(encoders) + 1)]
        self.encoders = nn.ModuleList(stack(width, depth) for width, depth in zip(widths, encoders, strict=False))
        self.downs = nn.ModuleList(nn.Conv2d(width, 2 * width, 2, 2) for width in widths[:-1])
        self.middle = nn.ModuleList(RegionGroup(widths[-1], depth, heads, window, ratio) for depth in middle)
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, 2 * width, 1, bias=False), nn.PixelShuffle(2)) for width in widths[:0:-1]
        )
        pairs = zip(widths[-2::-1], decoders, strict=True)
        self.decoders = nn.ModuleList(stack(width, depth) for width, depth in pairs)

    def forward(self, images: Tensor, regions: Tensor | None = None) -> Tensor:
        """Restore images; ``regions`` (B, height, width) are whole numbers, one region for all without them."""
        batch, _, height, width = images.shape
        if regions is None:
            regions = torch.zeros(batch, height, width, dtype=torch.long, device=images.device)
        if regions.shape != (batch, height, width):
            raise ValueError(f"regions are {(batch, height, width)}; got {tuple(regions.shape)}")
        rows, columns = (self._places(size, images.device) for size in (height, width))
        padded = images[:, :, rows][:, :, :, columns]
        coarse = regions[:, rows][:, :, columns][:, :: self.multiple, :: self.multiple].flatten(1)
        return images + self.restored(padded, coarse)[:, :, :height, :width]

    def _places(self, size: int, device: torch.device) -> Tensor:
        """Rows or columns up to a multiple that can be halved into whole windows; the last stands for those beyond."""
        whole = -(-size // (self.multiple * self.window)) * self.multiple * self.window
        return torch.arange(whole, device=device).clamp(max=size - 1)

    def restored(self, images: Tensor, regions: Tensor) -> Tensor:
        """What is added to the images; ``regions`` (B, N) are those of the middle's pixels."""
        x, kept = self.stem(images), []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            kept.append(encoder(x))
            x = down(kept[-1])
        short = x
        for group in self.middle:
            x = group(x, regions)
        x = x + short
        for decoder, up, skipped in zip(self.decoders, self.ups, kept[::-1], strict=True):
            x = decoder(up(x) + skipped)
        return self.head(x)


def stack(dim: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(NAFBlock(dim) for _ in range(depth)))


@model(
    "rat",
    papers=("RAT (R-MSA)",),
    inputs="image",
    presets={"base": Preset({})},
    tiny={"channels": 2, "dim": 4, "encoders": (1,), "decoders": (1,), "middle": (2,), "heads": 2, "window": 2},
)
def rat(
    channels: int = 1,
    *,
    dim: int = 64,
    encoders: Sequence[int] = (2, 2),
    decoders: Sequence[int] = (2, 2),
    middle: Sequence[int] = (3, 3, 3, 3),
    heads: int = 8,
    window: int = 4,
    ratio: int = 2,
) -> RAT:
    """Region attention transformer: images restored by convolutions around attention inside given regions.

    ``model(images, regions)`` takes a map of whole numbers, such as Segment Anything makes of an image. Between
    encoders and decoders of convolutions, at a quarter of the size, pixels attend to those of their region and then of
    their window. Regions are any numbers; images of any size are padded with their last rows and columns. The sizes
    are those of the authors' code, which was followed in the scale of logits, the root of the number of heads, too.

    Yang et al., Region Attention Transformer for Medical Image Restoration, arXiv 2407.09268.

    >>> model = rat(dim=8, encoders=(1,), decoders=(1,), middle=(1,), heads=2)
    >>> model(torch.randn(2, 1, 19, 24), torch.randint(5, (2, 19, 24))).shape
    torch.Size([2, 1, 19, 24])
    """
    return RAT(channels, dim, encoders, decoders, middle, heads, window, ratio)
