"""Audio Mamba: spectrograms classified by bidirectional scans of their patches, without attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveate.catalogue.tiers import Preset, model
from foveate.mixers.recurrent_ssm.audio_mamba import BidirectionalMamba, insert_middle
from foveate.models.blocks.patch_classifier import PatchEmbedding, ResidualMixers, as_tokens


class AudioMambaClassifier(nn.Module):
    """Spectrograms (B, channels, frequencies, times) to classes, read at a class token in the middle of the patches.

    >>> model = AudioMambaClassifier(5, dim=16, depth=2, state=4, patch=4, size=(16, 24), channels=1)
    >>> model(torch.randn(2, 1, 16, 40)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self, classes: int, *, dim: int, depth: int, state: int, patch: int, size: tuple[int, int], channels: int
    ) -> None:
        super().__init__()
        self.embed = PatchEmbedding(channels, dim, (patch, patch), size)
        self.token, self.token_place = (nn.Parameter(0.02 * torch.randn(dim)) for _ in range(2))
        self.body = ResidualMixers(dim, depth, lambda layer: BidirectionalMamba(dim, state=state))
        self.head = nn.Linear(dim, classes)
        nn.init.zeros_(self.head.bias)
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    def forward(self, spectrograms: Tensor) -> Tensor:
        patches, _ = as_tokens(self.embed(spectrograms))
        x, place = insert_middle(patches, self.token + self.token_place)
        return self.head(self.body(x)[:, place])


@model(
    "audio_mamba_classifier",
    papers=("AuM (Audio Mamba)",),
    inputs="image",
    presets={"small": Preset({}, 25.5e6)},
    tiny={"classes": 5, "dim": 12, "depth": 2, "patch": 4, "size": (16, 24), "channels": 1},
    uses=("series",),
    notes="Blocks are the paper's Bi-Bi, as in its small model; at other sizes than ``size``, places are interpolated.",
)
def audio_mamba_classifier(
    classes: int = 527,
    *,
    dim: int = 384,
    depth: int = 24,
    state: int = 16,
    patch: int = 16,
    size: tuple[int, int] = (128, 1024),
    channels: int = 1,
) -> AudioMambaClassifier:
    """Audio Mamba: spectrograms classified by bidirectional scans of their patches. The sizes are AuM-S's.

    Erol, Senocak, Feng, Chung, Audio Mamba, arXiv 2406.03344.

    >>> audio_mamba_classifier(10, dim=16, depth=1, size=(32, 64))(torch.randn(2, 1, 32, 64)).shape
    torch.Size([2, 10])
    """
    return AudioMambaClassifier(classes, dim=dim, depth=depth, state=state, patch=patch, size=size, channels=channels)
