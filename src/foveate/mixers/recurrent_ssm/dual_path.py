"""Dual-path Mamba: a long sequence in overlapping chunks, scanned both ways inside each and across all of them."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch import Tensor, nn
from torch.nn.functional import pad

from foveate.catalogue.registry import register
from foveate.mixers.base import Mixer
from foveate.mixers.recurrent_ssm.audio_mamba import BidirectionalMamba
from foveate.mixers.recurrent_ssm.mamba import ScanOptions
from foveate.patterns import Layout


def segment(x: Tensor, size: int) -> Tensor:
    """Tokens x (B, N, C) in chunks (B, S, size, C) that overlap by half, so that each token is in two.

    >>> import torch
    >>> segment(torch.arange(1.0, 6.0).view(1, 5, 1), 4)[0, :, :, 0]
    tensor([[0., 0., 1., 2.],
            [1., 2., 3., 4.],
            [3., 4., 5., 0.],
            [5., 0., 0., 0.]])

    Half a chunk of zeros goes before the tokens and at least as many behind them.
    """
    hop = check_chunk(size) // 2
    behind = hop + -x.shape[1] % hop
    return pad(x, (0, 0, hop, behind)).unfold(1, size, hop).mT


def overlap_add(chunks: Tensor, length: int) -> Tensor:
    """The inverse of :func:`segment`: of each of ``length`` tokens, the mean of what its two chunks say.

    >>> import torch
    >>> x = torch.randn(2, 37, 3)
    >>> torch.equal(overlap_add(segment(x, 8), 37), x)
    True
    """
    hop = check_chunk(chunks.shape[2]) // 2
    first, second = chunks[:, :, :hop].flatten(1, 2), chunks[:, :, hop:].flatten(1, 2)
    return ((second[:, : -hop or None] + first[:, hop:]) / 2)[:, :length]


def check_chunk(size: int) -> int:
    if size < 2 or size % 2:
        raise ValueError(f"chunks overlap by half, so they have an even number of tokens; got {size}")
    return size


@register(
    "dual_path_mamba",
    papers=("Dual-path Mamba",),
    formula="c = segment(x), c += bimamba(c along a chunk), c += bimamba'(c across chunks), out = overlap_add(c) - x",
    supports={"noncausal"},
    notes="Where chunks lie depends on the first token, so padding in front of a sequence would change its result.",
)
class DualPathMamba(Mixer):
    """Bidirectional Mamba inside chunks of ``chunk`` tokens, then across chunks for each place in them.

    Both passes are residual blocks behind an RMS norm; returned is what they add to x.
    """

    tiny: ClassVar[dict[str, Any]] = {"chunk": 8, "expand": 1, "state": 4}

    def __init__(self, dim: int, *, chunk: int = 250, causal: bool = False, **mamba: Unpack[ScanOptions]) -> None:
        super().__init__(dim, causal=causal)
        self.chunk = check_chunk(chunk)
        self.norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-5) for _ in range(2))
        self.inside, self.across = (BidirectionalMamba(dim, **mamba) for _ in range(2))

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        if x.numel() == 0:
            return x
        chunks = segment(x, self.chunk)
        short = self.inside(self.norms[0](chunks).flatten(0, 1)).unflatten(0, (len(x), -1))
        across = self.norms[1](chunks + short).transpose(1, 2)  # (B, size, S, C)
        long = self.across(across.flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)
        return overlap_add(short + long, x.shape[1])
