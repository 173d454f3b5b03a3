"""Applications that add a number to the logits of pairs: regions that belong together, a reference's tokens.

Sizes that papers do not give, or that were not found, are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.catalogue.contracts import Hook
from foveate.catalogue.tiers import hook

TINY_LABELS = torch.arange(30) % 7 % 3


def region_bias(queries: Tensor, keys: Tensor, strength: float) -> Tensor:
    """(1, 1, N, M): ``strength`` for pairs of one region, minus it for pairs of two, 0 where either has none (-1).

    >>> region_bias(torch.tensor([0, 1, -1]), torch.tensor([0, 1]), 2.0)[0, 0]
    tensor([[ 2., -2.],
            [-2.,  2.],
            [ 0.,  0.]])
    """
    same = queries.unsqueeze(1) == keys
    known = (queries >= 0).unsqueeze(1) & (keys >= 0)
    return torch.where(same, strength, -strength).where(known, 0.0)[None, None]


@hook("makima_self", papers=("MAKIMA",), tiny={"labels": TINY_LABELS}, uses=("video",))
def makima_self(labels: Tensor | None = None, strength: float = 1.0) -> Hook:
    """MAKIMA's self-attention: pairs of tokens of one attribute's region are strengthened, those across suppressed.

    ``labels`` (N,) are regions of tokens, -1 for none; by default of 4 frames of 16 x 16 tokens with two regions.
    By how much the paper does so was not found. MAKIMA: Tuning-free Multi-Attribute
    Open-domain Video Editing via Mask-Guided Attention Modulation, arXiv 2412.19978.
    """
    labels = torch.arange(1024) % 16 // 6 - 1 if labels is None else labels
    return Hook("full", heads=8, head_dim=40, length=len(labels), bias=region_bias(labels, labels, strength))


@hook(
    "makima_cross",
    papers=("MAKIMA",),
    tiny={"labels": TINY_LABELS, "words": torch.tensor([-1, 0, 0, 1, 2, -1])},
    uses=("video",),
)
def makima_cross(labels: Tensor | None = None, words: Tensor | None = None, strength: float = 1.0) -> Hook:
    """MAKIMA's cross-attention: tokens of a region are drawn to the words of its attribute, and kept from others."""
    labels = torch.arange(1024) % 16 // 6 - 1 if labels is None else labels
    words = torch.arange(77) // 26 - 1 if words is None else words
    bias = region_bias(labels, words, strength)
    return Hook("full", heads=8, head_dim=40, length=len(words), queries=len(labels), bias=bias)


@hook("dreamvideo2", papers=("DreamVideo-2",), tiny={"mask": torch.linspace(0, 1, 11), "reference": 7}, uses=("video",))
def dreamvideo2(mask: Tensor | None = None, reference: int = 1024, least: float = 1e-4) -> Hook:
    """DreamVideo-2's masked reference attention: a frame sees itself and a reference image, the more inside its mask.

    ``mask`` (N,) are weights in [0, 1] of the frame's tokens, 1 where the subject shall be; ``reference`` keys and
    values of the reference stand before the frame's own. Logs of the weights, of ``least`` at least, are added to the
    logits of the reference's keys, so that each of their weights is multiplied by that of the query's place.
    Wei et al., DreamVideo-2: Zero-Shot Subject-Driven Video Customization, arXiv 2410.13830.
    """
    mask = torch.linspace(0, 1, 1024) if mask is None else mask
    weight = mask.clamp_min(least).log().unsqueeze(1).expand(-1, reference)
    bias = torch.cat([weight, torch.zeros(len(mask), len(mask))], 1)[None, None]
    return Hook("full", heads=8, head_dim=64, length=reference + len(mask), queries=len(mask), bias=bias)
