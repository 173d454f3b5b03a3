"""A classifier of patches: tokens with learned places, residual mixers, a linear head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from foveate.mixers.base import Mixer
from foveate.patterns import Grid, Layout

CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
INTERPOLATIONS = {2: "bicubic", 3: "trilinear"}


class PatchEmbedding(nn.Module):
    """Images or videos (B, channels, *sizes) to a map of patches (B, C, *grid), each with its learned place.

    ``size`` is the one that has places of its own; those of other sizes lie between them.

    >>> PatchEmbedding(1, 8, (4, 4), (16, 24))(torch.randn(2, 1, 16, 24)).shape
    torch.Size([2, 8, 4, 6])
    """

    def __init__(self, channels: int, dim: int, patch: Sequence[int], size: Sequence[int]) -> None:
        super().__init__()
        sides = tuple(patch)
        self.patches = CONVOLUTIONS[len(sides)](channels, dim, sides, stride=sides)
        grid = [whole // side for whole, side in zip(size, sides, strict=True)]
        self.places = nn.Parameter(torch.empty(1, dim, *grid))
        nn.init.trunc_normal_(self.places, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images)
        grid = x.shape[2:]
        if grid == self.places.shape[2:]:
            return x + self.places
        return x + interpolate(self.places, size=grid, mode=INTERPOLATIONS[len(grid)], align_corners=False)


class ResidualMixers(nn.Module):
    """x + mixer(norm(x)), one mixer after the other, and a norm of what comes out.

    >>> from foveate.catalogue.registry import mixer
    >>> ResidualMixers(8, 2, lambda layer: mixer("audio_mamba", 8))(torch.randn(2, 9, 8)).shape
    torch.Size([2, 9, 8])
    """

    def __init__(self, dim: int, depth: int, mixer: Callable[[int], Mixer]) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(mixer(layer) for layer in range(depth))
        self.norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-5) for _ in range(depth + 1))

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        for norm, mixer in zip(self.norms, self.mixers, strict=False):  # the last norm is that of the result
            x = x + mixer(norm(x), layout=layout)
        return self.norms[-1](x)


def as_tokens(images: Tensor) -> tuple[Tensor, Grid]:
    """A map (B, C, *grid) as tokens (B, N, C), and where they live."""
    return images.flatten(2).mT, Grid(*images.shape[2:])
