"""VMamba: a pyramid of selective scans along the rows and columns of images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from foveate.catalogue.tiers import Preset, model
from foveate.mixers.recurrent_ssm.mamba import SelectiveScan
from foveate.mixers.recurrent_ssm.vmamba import VMamba
from foveate.models.vision.pyramid import Block, ConvMlp, PixelNorm, Pyramid, Residual, half


@model(
    "vmamba_backbone",
    papers=("VMamba / SS2D",),
    inputs="image",
    presets={
        "tiny": Preset({}, 30e6),
        "small": Preset({"depths": (2, 2, 15, 2), "expand": 2}, 50e6),
        "base": Preset({"dims": (128, 256, 512, 1024), "depths": (2, 2, 15, 2), "expand": 2}, 89e6),
    },
    tiny={"classes": 5, "dims": (16, 24), "depths": (1, 2)},
    supports={"features"},
)
def vmamba_backbone(
    classes: int = 1000,
    *,
    dims: Sequence[int] = (96, 192, 384, 768),
    depths: Sequence[int] = (2, 2, 8, 2),
    expand: int = 1,
    state: int = 1,
    channels: int = 3,
) -> Pyramid:
    """VMamba: SS2D, without its gate, and two linear layers in each block of a pyramid. The sizes are VMamba-T's.

    Liu et al., VMamba: Visual State Space Model, arXiv 2401.10166, the last version.

    >>> import torch
    >>> vmamba_backbone(10, dims=(16, 32), depths=(1, 1))(torch.randn(1, 3, 32, 48)).shape
    torch.Size([1, 10])
    """

    def block(stage: int, index: int) -> Block:
        dim = dims[stage]
        scans = VMamba(dim, expand=expand, state=state, gate=False)
        return [Residual(dim, inner, norm=nn.LayerNorm(dim)) for inner in (scans, ConvMlp(dim, 4 * dim))]

    stem = nn.Sequential(
        half(channels, dims[0] // 2),
        PixelNorm(dims[0] // 2),
        nn.GELU(),
        half(dims[0] // 2, dims[0]),
        PixelNorm(dims[0]),
    )
    made = Pyramid(
        block, dims=dims, depths=depths, classes=classes, stem=stem, halve=pixel_normed_half, norm=nn.LayerNorm
    )
    init_linears(made)
    return made


def pixel_normed_half(small: int, large: int) -> nn.Module:
    return nn.Sequential(half(small, large), PixelNorm(large))


def init_linears(module: nn.Module) -> None:
    """Normal numbers of deviation 0.02 and no bias in all linear layers but those of the scans."""
    if isinstance(module, SelectiveScan):
        return
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    for each in module.children():
        init_linears(each)
