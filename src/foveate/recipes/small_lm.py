"""A small language model that recipes are tried on."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class SmallLM(nn.Module):
    """A language model of mixers and MLPs, of tokens (B, N) to logits (B, N, vocabulary)."""

    def __init__(
        self, mixer: Callable[[int], nn.Module], *, vocabulary: int = 16, dim: int = 32, layers: int = 2
    ) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, dim), nn.Linear(dim, vocabulary)
        self.mixers = nn.ModuleList(mixer(dim) for _ in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for mixer, mlp, norm in zip(self.mixers, self.mlps, self.norms, strict=True):
            x = x + mixer(norm(x))
            x = x + mlp(x)
        return self.head(x)
