"""Vision backbones of the catalogue: RAVLT, SwiftFormer, L2ViT."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from foveate.attention import attend
from foveate.catalogue.tiers import Preset, model
from foveate.layers.local_conv import LocalConv
from foveate.mixers.base import split_heads
from foveate.mixers.exact_io.grid_windows import FlashWindowAttention
from foveate.mixers.linear.efficient_additive_attention import EfficientAdditiveAttention
from foveate.mixers.linear.l2vit_attention import L2ViTAttention, LocalConcentration
from foveate.mixers.linear.rala import RankAugmentedLinearAttention
from foveate.models.vision.pyramid import (
    Block,
    ConvEncoder,
    ConvMlp,
    Patches,
    PixelNorm,
    Pyramid,
    Residual,
    TokenBatchNorm,
    half,
    plain_stem,
    start_small,
)
from foveate.patterns import Layout


class GatedSoftmaxAttention(RankAugmentedLinearAttention):
    """RAVLT's attention where grids are small: softmax between the same projections, convolution and gate.

    >>> import torch
    >>> GatedSoftmaxAttention(64, heads=4)(torch.randn(2, 35, 64)).shape
    torch.Size([2, 35, 64])
    """

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split_heads(self.to_qkv(x), 3 * self.heads).chunk(3, 1)
        return q, k, v

    def attention(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout | None, key_mask: Tensor | None) -> Tensor:
        return attend(self.turn(q, layout), self.turn(k, layout), v, self.within(key_mask))


@model(
    "ravlt",
    papers=("RALA / RAVLT",),
    inputs="image",
    presets={
        "tiny": Preset({"dims": (64, 128, 256, 512), "depths": (2, 2, 6, 2), "heads": (1, 2, 4, 8)}, 15e6),
        "small": Preset({}, 26e6),
        "base": Preset({"dims": (96, 192, 384, 512), "depths": (4, 6, 12, 6), "heads": (1, 2, 6, 8)}, 48e6),
        "large": Preset({"dims": (96, 192, 448, 640), "depths": (4, 7, 19, 8), "heads": (1, 2, 7, 10)}, 95e6),
    },
    tiny={"classes": 5, "dims": (16, 24), "depths": (1, 2), "heads": (1, 2), "linear_stages": 1},
    supports={"features"},
)
def ravlt(
    classes: int = 1000,
    *,
    dims: Sequence[int] = (64, 128, 320, 512),
    depths: Sequence[int] = (3, 5, 9, 3),
    heads: Sequence[int] = (1, 2, 5, 8),
    linear_stages: int = 2,
    channels: int = 3,
) -> Pyramid:
    """RAVLT: rank-augmented linear attention in the first stages, softmax in the others. The sizes are RAVLT-S's.

    Fan, Huang, He, Breaking the Low-Rank Dilemma of Linear Attention, arXiv 2411.07635.

    >>> import torch
    >>> ravlt(10, dims=(16, 32), depths=(1, 1), heads=(1, 2))(torch.randn(1, 3, 32, 48)).shape
    torch.Size([1, 10])
    """

    def block(stage: int, index: int) -> Block:
        dim = dims[stage]
        kind = RankAugmentedLinearAttention if stage < linear_stages else GatedSoftmaxAttention
        return [
            Residual(dim, LocalConv(dim)),
            Residual(dim, kind(dim, heads[stage]), norm=nn.LayerNorm(dim), scale=1.0),
            Residual(dim, ConvMlp(dim, int(3.5 * dim), kernel=3), norm=nn.LayerNorm(dim), scale=1.0),
        ]

    stem = deep_stem(channels, dims[0])
    return Pyramid(block, dims=dims, depths=depths, classes=classes, stem=stem, neck=1024)


def deep_stem(channels: int, dim: int) -> nn.Module:
    """Four convolutions that quarter height and width."""
    sides = [half(channels, dim // 2), *(nn.Conv2d(dim // 2, dim // 2, 3, padding=1) for _ in range(2))]
    layers = [part for side in sides for part in (side, nn.BatchNorm2d(dim // 2), nn.GELU())]
    return nn.Sequential(*layers, half(dim // 2, dim), nn.BatchNorm2d(dim))


@model(
    "swiftformer",
    papers=("SwiftFormer",),
    inputs="image",
    presets={  # the paper's 3.5, 6.1, 12.1 and 28.5 million have another head in them, which learns from a teacher
        "XS": Preset({}, 3.5e6 - 221_000),
        "S": Preset({"dims": (48, 64, 168, 224), "depths": (3, 3, 9, 6)}, 6.1e6 - 225_000),
        "L1": Preset({"dims": (48, 96, 192, 384), "depths": (4, 3, 10, 5)}, 12.1e6 - 385_000),
        "L3": Preset({"dims": (64, 128, 320, 512), "depths": (4, 4, 12, 6)}, 28.5e6 - 513_000),
    },
    tiny={"classes": 5, "dims": (16, 24), "depths": (1, 2)},
    supports={"features"},
)
def swiftformer(
    classes: int = 1000,
    *,
    dims: Sequence[int] = (48, 56, 112, 220),
    depths: Sequence[int] = (3, 3, 6, 4),
    channels: int = 3,
) -> Pyramid:
    """SwiftFormer: convolutions, and efficient additive attention in the last block of each stage. The sizes are XS's.

    Shaker et al., SwiftFormer, arXiv 2303.15446.

    >>> import torch
    >>> swiftformer(10, dims=(16, 32), depths=(1, 2))(torch.randn(2, 3, 32, 48)).shape
    torch.Size([2, 10])
    """

    def block(stage: int, index: int) -> Block:
        dim = dims[stage]
        if index < depths[stage] - 1:
            return [Residual(dim, ConvEncoder(dim, 4 * dim), scale=1.0)]
        return [
            Residual(dim, ConvEncoder(dim, dim), scale=1.0),
            Residual(dim, EfficientAdditiveAttention(dim), scale=1e-5),
            Residual(dim, ConvMlp(dim, 4 * dim), norm=TokenBatchNorm(dim), scale=1e-5),
        ]

    return start_small(Pyramid(block, dims=dims, depths=depths, classes=classes, stem=plain_stem(channels, dims[0])))


@model(
    "l2vit",
    papers=("L2ViT",),
    inputs="image",
    presets={
        "tiny": Preset({}, 29e6),
        "small": Preset({"depths": (2, 2, 18, 2)}, 50e6),
        "base": Preset({"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024), "heads": (4, 8, 16, 32)}, 89e6),
    },
    tiny={"classes": 5, "dims": (16, 24), "depths": (2, 1), "heads": (1, 2), "window": 3},
    supports={"features"},
)
def l2vit(
    classes: int = 1000,
    *,
    dims: Sequence[int] = (96, 192, 384, 768),
    depths: Sequence[int] = (2, 2, 6, 2),
    heads: Sequence[int] = (3, 6, 12, 24),
    window: int = 7,
    channels: int = 3,
) -> Pyramid:
    """L2ViT: exact attention in windows and enhanced linear attention by turns. The sizes are L2ViT-Tiny's.

    Grids are halved by convolutions of 2 x 2 patches, those of odd sizes with zeros beside them.

    Zheng, The Linear Attention Resurrection in Vision Transformer, arXiv 2501.16182.

    >>> import torch
    >>> l2vit(10, dims=(16, 32), depths=(2, 2), heads=(1, 2))(torch.randn(1, 3, 32, 48)).shape
    torch.Size([1, 10])
    """

    def block(stage: int, index: int) -> Block:
        dim = dims[stage]

        def branch(inner: nn.Module) -> Residual:
            return Residual(dim, inner, norm=nn.LayerNorm(dim))

        mlp = branch(ConvMlp(dim, 4 * dim))
        if index % 2 == 0:
            local = FlashWindowAttention(dim, heads[stage], window=window, relative_bias=False)
            return [Residual(dim, LocalConv(dim)), branch(local), Residual(dim, LocalConv(dim)), mlp]
        whole = L2ViTAttention(dim, heads[stage], concentrate=False)
        return [Residual(dim, LocalConv(dim)), branch(whole), branch(LocalConcentration(dim)), mlp]

    stem = plain_stem(channels, dims[0], PixelNorm(dims[0]))
    sizes = {"dims": dims, "depths": depths, "classes": classes}
    return start_small(Pyramid(block, **sizes, stem=stem, halve=Patches, norm=nn.LayerNorm))  # type: ignore[arg-type]
