"""Applications to time series. Sizes that papers do not give, or that were not found, are ours."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.catalogue.contracts import Hook
from foveate.catalogue.tiers import hook


@hook(
    "vsformer",
    papers=("VSFormer",),
    tiny={"prior": torch.linspace(-1, 1, 13), "pairs": torch.linspace(-2, 2, 169).view(13, 13)},
    uses=("series",),
)
def vsformer(prior: Tensor | None = None, pairs: Tensor | None = None) -> Hook:
    """VSFormer's prior-enhanced self-attention: what is known of a token, or of a pair of them, is added to logits.

    ``prior`` (N,) says how telling each token of shape or value is for a class, ``pairs`` (N, N) how much two tokens
    have to do with one another; either may be left out. By default there are 100 tokens with a prior that rises: the
    paper's formula was not found, and where these numbers come from is the caller's. Classification is not here.
    VSFormer: Value and Shape-Aware Transformer with Prior-Enhanced Self-Attention for Multivariate Time Series
    Classification.
    """
    if pairs is None:
        prior = torch.linspace(-1, 1, 100) if prior is None else prior
        pairs = torch.zeros(len(prior), len(prior))
    length, bias = len(pairs), pairs
    if prior is not None and len(prior) != length:
        raise ValueError(f"a prior for {length} tokens is ({length},); got {tuple(prior.shape)}")
    if bias.shape != (length, length):
        raise ValueError(f"pairs of {length} tokens are ({length}, {length}); got {tuple(bias.shape)}")
    bias = bias if prior is None else bias + prior
    return Hook("full", heads=8, head_dim=16, length=length, bias=bias[None, None])
