"""SHViT: convolutions, and one head of attention on a part of the channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foveate.attention import attend
from foveate.catalogue.tiers import Preset, model

QK = 16  # channels of queries and of keys


def conv_norm(
    inputs: int, outputs: int, kernel: int = 1, *, stride: int = 1, groups: int = 1, start: float = 1.0
) -> nn.Module:
    """A convolution without a bias and a batch norm, whose weights are ``start`` at first."""
    norm = nn.BatchNorm2d(outputs)
    nn.init.constant_(norm.weight, start)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, norm)


class Added(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class SingleHeadAttention(nn.Module):
    """One head with queries and keys of 16 channels reads the first ``part`` channels; the others pass as they are.

    >>> SingleHeadAttention(24, 9)(torch.randn(2, 24, 5, 7)).shape
    torch.Size([2, 24, 5, 7])
    """

    def __init__(self, dim: int, part: int) -> None:
        super().__init__()
        if not 1 <= part <= dim:
            raise ValueError(f"the part that attends is some of the {dim} channels; got {part}")
        self.part, self.norm = part, nn.GroupNorm(1, part)
        self.to_qkv = conv_norm(part, 2 * QK + part)
        self.to_out = conv_norm(dim, dim, start=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W)."""
        mixed = self.to_qkv(self.norm(x[:, : self.part])).flatten(2).mT.unsqueeze(1)  # (B, 1, N, 2 QK + part)
        out = attend(*mixed.split([QK, QK, self.part], dim=-1))
        out = out.squeeze(1).mT.unflatten(2, x.shape[2:])
        return self.to_out(torch.relu(torch.cat([out, x[:, self.part :]], 1)))


class SqueezeExcite(nn.Module):
    """Channels times a sigmoid of what their means say through two layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = max(8, (dim // 4 + 4) // 8 * 8)
        self.first, self.second = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.second(torch.relu(self.first(x.mean((2, 3), keepdim=True)))))


def local(dim: int, start: float = 0.0) -> nn.Module:
    return Added(conv_norm(dim, dim, 3, groups=dim, start=start))


def channels_of(dim: int) -> nn.Module:
    return Added(nn.Sequential(conv_norm(dim, 2 * dim), nn.ReLU(), conv_norm(2 * dim, dim, start=0.0)))


def shrink(inputs: int, outputs: int) -> list[nn.Module]:
    """Half the height and width: a wide depthwise convolution between convolutions and channel mixers on both sides."""
    wide = 4 * inputs
    merge = nn.Sequential(
        conv_norm(inputs, wide),
        nn.ReLU(),
        conv_norm(wide, wide, 3, stride=2, groups=wide),
        nn.ReLU(),
        SqueezeExcite(wide),
        conv_norm(wide, outputs),
    )
    around = [nn.Sequential(local(dim, 1.0), channels_of(dim)) for dim in (inputs, outputs)]
    return [around[0], merge, around[1]]


class SHViT(nn.Module):
    """Images (B, C, H, W) to class logits; ``features`` are the maps of the three stages, of 1/16, 1/32 and 1/64."""

    def __init__(
        self,
        classes: int,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        parts: Sequence[int],
        channels: int,
        attention: type[nn.Module] = SingleHeadAttention,
    ) -> None:
        super().__init__()
        sides = [dims[0] // 8, dims[0] // 4, dims[0] // 2, dims[0]]
        convs = [
            conv_norm(before, after, 3, stride=2) for before, after in zip([channels, *sides], sides, strict=False)
        ]
        stem = [part for conv in convs for part in (conv, nn.ReLU())][:-1]
        stages = []
        for stage, (dim, depth, part) in enumerate(zip(dims, depths, parts, strict=True)):
            blocks = list(shrink(dims[stage - 1], dim)) if stage else stem
            for _ in range(depth):
                mixers = [Added(attention(dim, part))] if stage else []
                blocks.append(nn.Sequential(local(dim), *mixers, channels_of(dim)))
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.norm, self.head = nn.BatchNorm1d(dims[-1]), nn.Linear(dims[-1], classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def features(self, images: Tensor) -> list[Tensor]:
        """The maps (B, C, H, W) of the stages."""
        maps, x = [], images
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.features(images)[-1].mean((2, 3))))


@model(
    "shvit",
    papers=("SHViT",),
    inputs="image",
    presets={
        "S1": Preset({}, 6.3e6),
        "S2": Preset({"dims": (128, 308, 448), "parts": (32, 66, 96)}, 11.4e6),
        "S3": Preset({"dims": (192, 352, 448), "depths": (3, 5, 5), "parts": (48, 75, 96)}, 14.2e6),
        "S4": Preset({"dims": (224, 336, 448), "depths": (4, 7, 6), "parts": (48, 72, 96)}, 16.5e6),
    },
    tiny={"classes": 5, "dims": (16, 24, 24), "depths": (1, 1, 2), "parts": (4, 6, 5)},
    supports={"features"},
)
def shvit(
    classes: int = 1000,
    *,
    dims: Sequence[int] = (128, 224, 320),
    depths: Sequence[int] = (2, 4, 5),
    parts: Sequence[int] = (32, 48, 68),
    channels: int = 3,
) -> SHViT:
    """SHViT: patches of 16 by four convolutions, then one head of attention on about a fifth of the channels.

    The first stage has convolutions alone, the others attention too, with ``parts`` channels of each stage; the sizes
    are S1's. Yun, Ro, SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design, arXiv 2401.16456, after
    the authors' published code.

    >>> shvit(10, dims=(16, 24, 32), depths=(1, 1, 1), parts=(4, 6, 8))(torch.randn(2, 3, 64, 96)).shape
    torch.Size([2, 10])
    """
    return SHViT(classes, dims=dims, depths=depths, parts=parts, channels=channels)
