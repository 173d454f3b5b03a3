"""HOGformer: Histoformer's network, whose pixels are sorted by oriented gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, interpolate

from foveate.catalogue.tiers import Preset, model
from foveate.models.vision.histoformer import (
    DualScaleFeedForward,
    Histoformer,
    HistogramAttention,
    undo,
    unit_pixels,
)
from foveate.plain import remembered

BINS, PATCH = 9, 8


class Gradients(NamedTuple):
    """Of each channel and pixel: how large the gradient is, and its direction as a share of the whole turn, from -π."""

    size: Tensor
    turn: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Gradients:
        """By Sobel's filters over images (B, C, h, w), zeros around them."""
        across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=x.dtype, device=x.device)
        filters = (each.expand(x.shape[1], 1, 3, 3) for each in (across, across.T))
        gx, gy = (conv2d(x, weight, padding=1, groups=x.shape[1]) for weight in filters)
        turn = (torch.atan2(gy.detach(), gx.detach()) + math.pi) / (2 * math.pi)
        return cls((gx.square() + gy.square() + 1e-6).sqrt(), turn)


@remembered(64)
def patches(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Of pixels row by row the number of their patch, and pixels patch by patch; those at the far border are cut."""
    rows, columns = (torch.arange(size, device="cpu") // PATCH for size in (height, width))
    number = (rows.unsqueeze(1) * -(-width // PATCH) + columns).flatten()
    return number, number.argsort(stable=True)


class HOGAttention(HistogramAttention):
    """Dynamic self-attention by histograms of oriented gradients: as Histoformer's, but sorted by gradients.

    Half of the channels are sorted within patches of 8 x 8 before the convolutions, by the sum over channels of each
    gradient's size times the number of its direction among nine, and put back behind the last; added to them is a map
    of the patches' histograms, of sizes by direction, through a linear map. Then all pixels are sorted by the sum over
    the values' channels of size times direction. Sorted pixels are cut into ``heads`` bins, or dealt out to as many,
    and bins attend as in `HistogramAttention`.

    Patches at the border are cut, and sort what pixels they have: the authors' code fills them up with zeros, which
    then push pixels out of the image. Gradients flow through the histograms, none through orders.

    >>> HOGAttention(8, 2)(torch.randn(1, 8, 9, 11)).shape
    torch.Size([1, 8, 9, 11])
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.of_bins = nn.Conv2d(BINS, dim // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        dims = x.shape[2:]
        first, rest = x.chunk(2, 1)
        gradients = Gradients.of(first)
        number = (gradients.turn * BINS).long() % BINS
        order, places = self.in_patches((gradients.size.detach() * (number + 1)).sum(1))
        ahead = moved(first, order, places) + self.described(gradients.size, number)
        q1, k1, q2, k2, v = self.local(self.to_all(torch.cat((ahead, rest), 1))).flatten(2).chunk(5, 1)
        of_values = Gradients.of(v.detach().unflatten(2, dims))
        score = (of_values.size * of_values.turn).sum(1).flatten(1)
        by_score = score.argsort(dim=1, stable=True).unsqueeze(1).expand_as(v)
        q1, k1, q2, k2, v = (each.gather(2, by_score) for each in (q1, k1, q2, k2, v))
        ways = (self.between_bins(q1, k1, v, in_runs=True), self.between_bins(q2, k2, v, in_runs=False))
        of_runs, of_deals = (undo(each, by_score, 2) for each in ways)
        out = self.to_out((of_runs * of_deals).unflatten(2, dims))
        first, rest = out.chunk(2, 1)
        return torch.cat((moved(first, places, order), rest), 1)

    @staticmethod
    def in_patches(score: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, N) of each patch by a score (B, h, w), and the places (B, N) that they take, one after another."""
        number, by_patch = (each.to(score.device) for each in patches(*score.shape[1:]))
        by_score = score.flatten(1).argsort(dim=1, stable=True)
        return by_score.gather(1, number[by_score].argsort(dim=1, stable=True)), by_patch.expand_as(by_score)

    def described(self, size: Tensor, number: Tensor) -> Tensor:
        """The patches' histograms (sizes by direction, adding up to 1) as a map (B, C, h, w)."""
        height, width = size.shape[2:]
        patch = patches(height, width)[0].to(size.device)
        down, across = -(-height // PATCH), -(-width // PATCH)
        bins = (patch * BINS + number.flatten(2)).flatten(1)  # (B, C N)
        sums = size.new_zeros(len(size), down * across * BINS).scatter_add(1, bins, size.flatten(1))
        histogram = sums.unflatten(1, (-1, BINS)) / size.shape[1] / PATCH**2
        histogram = histogram / (histogram.sum(2, keepdim=True) + 1e-8)
        maps = self.of_bins(histogram.mT.unflatten(2, (down, across)))
        return interpolate(maps, size=(height, width), mode="bilinear")


def moved(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Images (B, C, h, w) whose pixels ``source`` (B, N) come to the places ``target`` (B, N)."""
    flat = x.flatten(2)
    taken = flat.gather(2, source.unsqueeze(1).expand_as(flat))
    return torch.zeros_like(flat).scatter(2, target.unsqueeze(1).expand_as(flat), taken).view_as(x)


class DynamicInteractionFeedForward(DualScaleFeedForward):
    """Histoformer's, with what differs from one channel's GELU added, times a scale for each channel."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(dim, hidden)
        self.to_one = nn.Conv2d(hidden // 4, 1, 1)
        self.sigma = nn.Parameter(torch.full((1, hidden // 4, 1, 1), 1e-5))

    def gated(self, x: Tensor) -> Tensor:
        return x + self.sigma * (x - gelu(self.to_one(x)))


class HOGBlock(nn.Module):
    """Attention and feed-forward, behind norms of each pixel without parameters."""

    def __init__(self, dim: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.attention = HOGAttention(dim, heads)
        self.feed_forward = DynamicInteractionFeedForward(dim, int(dim * ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(unit_pixels(x))
        return x + self.feed_forward(unit_pixels(x))


@model(
    "hogformer",
    papers=("HOGformer",),
    inputs="image",
    presets={"base": Preset({})},
    tiny={"dim": 4, "depths": (1, 1, 1), "refinement": 1, "heads": (1, 2, 4), "ratio": 2.0},
)
def hogformer(
    channels: int = 3,
    *,
    dim: int = 36,
    depths: Sequence[int] = (4, 4, 6, 8),
    refinement: int = 4,
    heads: Sequence[int] = (1, 2, 4, 8),
    ratio: float = 2.667,
) -> Histoformer:
    """HOGformer: images restored by attention among bins of pixels of similar oriented gradients, at linear cost.

    Histoformer's network with two parts exchanged, after the authors' published code, in which convolution (the paper's
    local dynamic-range one) and attention are one module. Images of any size are padded with their last rows and
    columns.

    Beyond Degradation Conditions: All-in-One Image Restoration via HOG Transformers, arXiv 2504.09377.

    >>> model = hogformer(dim=4, depths=(1, 1), refinement=1, heads=(1, 2), ratio=2.0)
    >>> model(torch.randn(2, 3, 19, 24)).shape
    torch.Size([2, 3, 19, 24])
    """
    return Histoformer(channels, dim, depths, refinement, heads, ratio, HOGBlock)
