"""A small diffusion transformer to try recipes on: noisy images and time steps to noise and variance, as DiT's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from foveate.attention import attend
from foveate.mixers.base import join_heads, split_heads

DIM, SIDE, CHANNELS, HEADS = 16, 6, 2, 4


class SelfAttention(nn.Module):
    """Softmax attention of all tokens (B, N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 3 * HEADS).chunk(3, 1)
        return self.proj(join_heads(attend(q, k, v)))


class DiTBlock(nn.Module):
    """Attention and an MLP, each shifted, scaled and gated by the time step."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = SelfAttention(), nn.LayerNorm(DIM, elementwise_affine=False)
        self.first, self.second = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)
        self.condition = nn.Linear(DIM, 6 * DIM)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.condition(time).unsqueeze(1).chunk(6, -1)
        x = x + gate * self.attention(self.norm(x) * (1 + scale) + shift)
        hidden = self.norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.second(gelu(self.first(hidden)))


class SmallDiT(nn.Module):
    """Images (B, 2, 6, 6) and embedded times (B, 16) to noise and variance (B, 4, 6, 6).

    >>> images, time, _ = noisy_images()
    >>> SmallDiT()(images, time).shape
    torch.Size([4, 4, 6, 6])
    """

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(CHANNELS, DIM), nn.Linear(DIM, 2 * CHANNELS)
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(2))

    def forward(self, images: Tensor, time: Tensor) -> Tensor:
        x = self.enter(images.flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x, time)
        return self.leave(x).transpose(1, 2).unflatten(2, images.shape[2:])


def noisy_images(batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Images with noise on them, embedded times, and the noise."""
    noise = torch.randn(batch, CHANNELS, SIDE, SIDE)
    return noise + torch.linspace(-1, 1, SIDE), torch.randn(batch, DIM), noise
