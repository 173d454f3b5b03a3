"""TimeSformer: a vision transformer of clips whose attention is divided over time and space, or not."""

from __future__ import annotations

from itertools import product
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate

from foveate.attention import attend
from foveate.catalogue.tiers import Preset, model
from foveate.mixers.base import divided, join_heads, split_heads
from foveate.patterns import Grid, Layout, Pattern, full, neighborhood

Scheme = Literal["divided", "joint", "space", "axial", "local_global"]
TIME, HEIGHT, WIDTH = 1, 2, 3  # axes of a clip (B, T, H, W, C)


class SelfAttention(nn.Module):
    """Softmax attention of tokens (B, N, C), with biases."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        divided(dim, heads)
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, pattern: Pattern = full, layout: Layout | None = None) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 3 * self.heads).chunk(3, 1)
        return self.proj(join_heads(attend(q, k, v, pattern, layout=layout)))


class Mixed(NamedTuple):
    """A clip (B, T, H, W, C), and the class token (B, 1, C) of those who read one."""

    clip: Tensor
    token: Tensor | None


class Along(nn.Module):
    """Attention among the patches that differ in some axes only; the class token joins every group, and is averaged."""

    def __init__(self, dim: int, heads: int, *axes: int) -> None:
        super().__init__()
        self.attention, self.axes = SelfAttention(dim, heads), axes

    def forward(self, clip: Tensor, token: Tensor | None = None) -> Mixed:
        rest = [axis for axis in (TIME, HEIGHT, WIDTH) if axis not in self.axes]
        order = [0, *rest, *self.axes, 4]
        placed = clip.permute(order)
        groups = placed.flatten(1, len(rest)) if rest else placed.unsqueeze(1)
        mixed = in_groups(self.attention, groups.flatten(2, -2), token)
        back = torch.tensor(order).argsort().tolist()
        return Mixed(mixed.clip.reshape(placed.shape).permute(back), mixed.token)


class Near(nn.Module):
    """Attention to the patches of all frames in half of the height and of the width around; it reads no class token."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads)

    def forward(self, clip: Tensor, token: Tensor | None = None) -> Mixed:
        _, T, H, W, _ = clip.shape
        kernels = [(side, kernel) for side, kernel in ((T, T), (H, H // 2), (W, W // 2)) if side > 1]
        pattern = neighborhood(tuple(max(kernel, 2) for _, kernel in kernels)) if kernels else full
        grid = Grid(*(side for side, _ in kernels)) if kernels else None
        mixed = self.attention(clip.flatten(1, 3), pattern, grid)
        return Mixed(mixed.view(clip.shape), None)


class Strided(nn.Module):
    """Attention to every second patch of the whole clip along each axis; the class token joins every group."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads)

    def forward(self, clip: Tensor, token: Tensor | None = None) -> Mixed:
        out, tokens = torch.empty_like(clip), []
        for first in product((0, 1), repeat=3):
            own = (slice(None), *(slice(start, None, 2) for start in first))
            if (group := clip[own]).numel():
                mixed = in_groups(self.attention, group.flatten(1, 3).unsqueeze(1), token)
                out[own] = mixed.clip.view(group.shape)
                tokens += [] if mixed.token is None else [mixed.token]
        return Mixed(out, torch.stack(tokens).mean(0) if tokens else None)


def in_groups(attention: SelfAttention, groups: Tensor, token: Tensor | None) -> Mixed:
    """Attention inside groups of tokens (B, G, N, C), each with the class token (B, 1, C) in front if there is one."""
    B, G, _, C = groups.shape
    if token is None:
        return Mixed(attention(groups.flatten(0, 1)).view(groups.shape), None)
    joined = torch.cat([token.unsqueeze(1).expand(B, G, 1, C), groups], 2)
    mixed = attention(joined.flatten(0, 1)).view(joined.shape)
    return Mixed(mixed[:, :, 1:], mixed[:, :, 0].mean(1, keepdim=True))


def steps(scheme: Scheme, dim: int, heads: int) -> list[nn.Module]:
    """The attentions of a block, in order; the last of them reads the class token."""
    if scheme == "local_global":
        return [Near(dim, heads), Strided(dim, heads)]
    axes: dict[str, list[tuple[int, ...]]] = {
        "space": [(HEIGHT, WIDTH)],
        "joint": [(TIME, HEIGHT, WIDTH)],
        "divided": [(TIME,), (HEIGHT, WIDTH)],
        "axial": [(TIME,), (WIDTH,), (HEIGHT,)],
    }
    return [Along(dim, heads, *own) for own in axes[scheme]]


class Block(nn.Module):
    """The attentions of a scheme and an MLP, each behind a norm and beside a residual."""

    def __init__(self, dim: int, heads: int, scheme: Scheme, hidden: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(steps(scheme, dim, heads))
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in self.attentions)
        self.joins = nn.ModuleList(nn.Linear(dim, dim) for _ in self.attentions[:-1])
        self.mlp_norm, self.fc1 = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, clip: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        for attention, norm, join in zip(self.attentions, self.norms, self.joins, strict=False):
            clip = clip + join(attention(norm(clip)).clip)
        norm = self.norms[-1]
        mixed = self.attentions[-1](norm(clip), norm(token))
        clip, token = clip + mixed.clip, token + mixed.token
        return clip + self.mlp(clip), token + self.mlp(token)

    def mlp(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(self.mlp_norm(x))))


class TimeSformer(nn.Module):
    """Clips (B, channels, T, height, width) to classes, by a class token.

    >>> sizes = {"dim": 16, "depth": 2, "heads": 2, "patch": 4, "frames": 3, "size": 8, "channels": 3}
    >>> TimeSformer(5, scheme="divided", **sizes)(torch.randn(2, 3, 4, 8, 12)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        classes: int,
        *,
        scheme: Scheme,
        dim: int,
        depth: int,
        heads: int,
        patch: int,
        frames: int,
        size: int,
        channels: int,
    ) -> None:
        super().__init__()
        self.scheme, side = scheme, size // patch
        self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
        self.token = nn.Parameter(torch.empty(1, 1, dim))
        self.token_place = nn.Parameter(torch.zeros(1, 1, dim))
        self.places = nn.Parameter(torch.empty(1, dim, side, side))
        self.times = nn.Parameter(torch.zeros(1, dim, frames)) if scheme != "space" else None
        self.blocks = nn.ModuleList(Block(dim, heads, scheme, 4 * dim) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in (self.token, self.token_place, self.places):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for block in self.blocks[1:]:
            for join in block.joins:  # type: ignore[union-attr]
                nn.init.zeros_(join.weight)

    def forward(self, videos: Tensor) -> Tensor:
        B, _, T, _, _ = videos.shape
        clip = self.embed(videos)
        token = (self.token + self.token_place).expand(len(clip), -1, -1)
        for block in self.blocks:
            clip, token = block(clip, token)
        if self.scheme == "space":
            token = token.view(B, T, -1).mean(1, keepdim=True)
        return self.head(self.norm(token[:, 0]))

    def embed(self, videos: Tensor) -> Tensor:
        """Patches with their places in space and time, (B, T, H, W, C); frames as clips where nothing joins them."""
        patches = self.patches(videos.transpose(1, 2).flatten(0, 1))
        patches = patches + resized(self.places, patches.shape[2:])
        clip = patches.unflatten(0, (len(videos), -1)).permute(0, 1, 3, 4, 2)
        if self.times is None:
            return clip.flatten(0, 1).unsqueeze(1)
        return clip + resized(self.times, clip.shape[1:2]).mT[:, :, None, None]


def resized(places: Tensor, sizes: torch.Size) -> Tensor:
    """Learned places (1, C, *sizes) for another number of them: the nearest ones."""
    return places if places.shape[2:] == sizes else interpolate(places, size=tuple(sizes), mode="nearest")


@model(
    "timesformer",
    papers=("TimeSformer",),
    inputs="video",
    presets={
        "divided": Preset({}, 121.4e6),
        "joint": Preset({"scheme": "joint"}, 85.9e6),
        "space": Preset({"scheme": "space"}, 85.9e6),
        "axial": Preset({"scheme": "axial"}, 156.8e6),
        "local_global": Preset({"scheme": "local_global"}, 121.4e6),
        "high_resolution": Preset({"frames": 16, "size": 448}),
        "long": Preset({"frames": 96}),
    },
    tiny={"classes": 5, "dim": 12, "depth": 2, "heads": 2, "patch": 4, "frames": 4, "size": 16},
)
def timesformer(
    classes: int = 400,
    *,
    scheme: Scheme = "divided",
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    patch: int = 16,
    frames: int = 8,
    size: int = 224,
    channels: int = 3,
) -> TimeSformer:
    """TimeSformer: each patch attends to its place in all frames, then to its frame: T + N pairs a patch, not T N.

    Schemes: ``divided`` as said; ``joint``, all patches of the clip; ``space``, each frame on its own, averaged at the
    end; ``axial``, along time, width and height; ``local_global``, all frames in half of the height and width around,
    then every second patch along each axis.

    The authors' code is followed: attention over time leaves the class token out, where the paper's formula has it
    among the keys; in space it joins each frame and is averaged over them; what a step over time adds passes a linear
    layer, which begins at zero but in the first block. Their code has no ``axial`` and no ``local_global``: here these
    do the same, all steps but the last as that over time. Clips of other sizes take the nearest places.

    Bertasius, Wang, Torresani, Is Space-Time Attention All You Need for Video Understanding?, arXiv 2102.05095.

    >>> timesformer(10, dim=24, depth=1, heads=2, size=32)(torch.randn(2, 3, 4, 32, 32)).shape
    torch.Size([2, 10])

    Raises ValueError for an unknown scheme.
    """
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme is one of {', '.join(get_args(Scheme))}; got {scheme!r}")
    sizes = {"dim": dim, "depth": depth, "heads": heads, "patch": patch, "frames": frames, "size": size}
    return TimeSformer(classes, scheme=scheme, channels=channels, **sizes)
