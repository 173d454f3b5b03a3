"""S-Mamba: several series forecast at once, a token for each, by bidirectional Mamba over them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from foveate.catalogue.tiers import model
from foveate.mixers.recurrent_ssm.s_mamba import SMamba


class SMambaLayer(nn.Module):
    """Variates mix by two Mamba blocks, one over them reversed; then two linear layers a variate.

    >>> SMambaLayer(8, hidden=12, state=4, dropout=0.0)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, *, hidden: int, state: int, dropout: float) -> None:
        super().__init__()
        self.mix = SMamba(dim, state=state)
        self.first, self.second = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](x + self.mix(x))
        hidden = self.dropout(gelu(self.first(x)))
        return self.norms[1](x + self.dropout(self.second(hidden)))


class SMambaForecaster(nn.Module):
    """Series (B, past, variates) to their future (B, future, variates), any number of variates.

    >>> model = SMambaForecaster(past=12, future=5, dim=8, depth=2, hidden=16, state=4, dropout=0.1)
    >>> model(torch.randn(2, 12, 7)).shape
    torch.Size([2, 5, 7])
    """

    def __init__(
        self, *, past: int, future: int, dim: int, depth: int, hidden: int, state: int, dropout: float
    ) -> None:
        super().__init__()
        self.past = past
        self.embed, self.dropout = nn.Linear(past, dim), nn.Dropout(dropout)
        self.layers = nn.ModuleList(SMambaLayer(dim, hidden=hidden, state=state, dropout=dropout) for _ in range(depth))
        self.norm, self.to_future = nn.LayerNorm(dim), nn.Linear(dim, future)

    def forward(self, series: Tensor) -> Tensor:
        if series.dim() != 3 or series.shape[1] != self.past:
            raise ValueError(f"series are (batch, {self.past}, variates); got {tuple(series.shape)}")
        mean = series.mean(1, keepdim=True)
        spread = (series.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        x = self.dropout(self.embed(((series - mean) / spread).mT))  # (B, variates, C)
        for layer in self.layers:
            x = layer(x)
        return self.to_future(self.norm(x)).mT * spread + mean


@model(
    "s_mamba_forecaster",
    papers=("S-Mamba",),
    inputs="vectors",
    presets={},
    tiny={"past": 12, "future": 5, "dim": 12, "depth": 2, "hidden": 20, "state": 4},
    uses=("series",),
    sample=lambda batch, size: torch.randn(batch, 12, size),
    notes="The defaults are those of the authors' code; its series are normalised by their own mean and spread.",
)
def s_mamba_forecaster(
    past: int = 96,
    future: int = 96,
    *,
    dim: int = 512,
    depth: int = 2,
    hidden: int = 2048,
    state: int = 32,
    dropout: float = 0.1,
) -> SMambaForecaster:
    """S-Mamba: several series forecast at once, a token for each, by bidirectional Mamba over them.

    Wang et al., Is Mamba Effective for Time Series Forecasting?, arXiv 2403.11144.

    >>> s_mamba_forecaster(12, 5, dim=8, depth=1, hidden=16)(torch.randn(2, 12, 7)).shape
    torch.Size([2, 5, 7])
    """
    return SMambaForecaster(past=past, future=future, dim=dim, depth=depth, hidden=hidden, state=state, dropout=dropout)
