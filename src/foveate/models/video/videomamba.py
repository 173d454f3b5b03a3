"""VideoMamba: videos classified by scans of their tubelets, forwards and backwards in space and time."""

from __future__ import annotations

from torch import Tensor, nn

from foveate.catalogue.tiers import model
from foveate.mixers.recurrent_ssm.videomamba import VideoMamba
from foveate.models.blocks.patch_classifier import PatchEmbedding, ResidualMixers, as_tokens


class VideoMambaClassifier(nn.Module):
    """Videos (B, channels, frames, height, width) to classes, by the mean of their tubelets.

    >>> import torch
    >>> sizes = {"dim": 16, "depth": 2, "state": 4, "tubelet": (2, 4, 4), "size": (4, 8, 8), "channels": 3}
    >>> VideoMambaClassifier(5, **sizes)(torch.randn(2, 3, 6, 8, 12)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        classes: int,
        *,
        dim: int,
        depth: int,
        state: int,
        tubelet: tuple[int, int, int],
        size: tuple[int, int, int],
        channels: int,
    ) -> None:
        super().__init__()
        self.embed = PatchEmbedding(channels, dim, tubelet, size)
        self.body = ResidualMixers(dim, depth, lambda layer: VideoMamba(dim, state=state))
        self.head = nn.Linear(dim, classes)
        nn.init.zeros_(self.head.bias)
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    def forward(self, videos: Tensor) -> Tensor:
        x, grid = as_tokens(self.embed(videos))
        return self.head(self.body(x, grid).mean(1))


@model(
    "videomamba_classifier",
    papers=("VideoMamba (ST-SSM)",),
    inputs="video",
    presets={},
    tiny={"classes": 5, "dim": 12, "depth": 2, "tubelet": (2, 4, 4), "size": (4, 16, 24)},
    notes="The authors published no code. Sizes and head are chosen here: Vision Mamba's small ones, and a mean.",
)
def videomamba_classifier(
    classes: int = 400,
    *,
    dim: int = 384,
    depth: int = 24,
    state: int = 16,
    tubelet: tuple[int, int, int] = (2, 16, 16),
    size: tuple[int, int, int] = (16, 224, 224),
    channels: int = 3,
) -> VideoMambaClassifier:
    """VideoMamba: videos classified by scans of their tubelets, forwards and backwards in space and time.

    Park et al., VideoMamba: Spatio-Temporal Selective State Space Model, arXiv 2407.08476.

    >>> import torch
    >>> videomamba_classifier(10, dim=16, depth=1, size=(4, 32, 32))(torch.randn(2, 3, 4, 32, 32)).shape
    torch.Size([2, 10])
    """
    return VideoMambaClassifier(
        classes, dim=dim, depth=depth, state=state, tubelet=tubelet, size=size, channels=channels
    )
