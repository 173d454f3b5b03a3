"""Bidirectional Mamba, as in Audio Mamba and Vision Mamba."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.catalogue.registry import register
from foveate.layouts.orders import (
    Order,
    bidirectional,
)
from foveate.mixers.recurrent_ssm.scan_mixer import ScanMixer
from foveate.patterns import Layout


@register(
    "audio_mamba",
    papers=("AuM (Audio Mamba)",),
    formula="out = W ((scan(u) + reverse(scan'(reverse(u)))) ⊙ silu(z))",
    supports={"noncausal", "padding", "packed"},
    notes=(
        "The block is Vision Mamba's (2401.09417), the paper's variant Bi-Bi. The authors' code halves the sum of the "
        "scans, the paper does not. Padding lies at the ends of a sequence, as with mamba."
    ),
)
class BidirectionalMamba(ScanMixer):
    """A gated block around one scan forwards and one backwards, each with its own convolution and parameters.

    A class token belongs in the middle, where neither scan's state has decayed much: see :func:`insert_middle`.
    """

    def orders(self, layout: Layout) -> Sequence[Order]:
        return bidirectional(layout)


def insert_middle(x: Tensor, token: Tensor) -> tuple[Tensor, int]:
    """Tokens x (B, N, C) with one more (C,) in their middle, and where it is.

    >>> x, place = insert_middle(torch.zeros(1, 5, 2), torch.ones(2))
    >>> x[0, :, 0], place
    (tensor([0., 0., 1., 0., 0., 0.]), 2)
    """
    place = x.shape[1] // 2
    return torch.cat([x[:, :place], token.expand(x.shape[0], 1, -1), x[:, place:]], dim=1), place
