"""Cores: attention on given queries, keys and values, without parameters of its own.

A core is what a training-free method is: it can take the place of the attention inside any pretrained model,
and inside a mixer it is surrounded by projections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from foveate.attention import Bias, Weights, attend
from foveate.patterns import Layout, Pattern, full


class Core(Protocol):
    """Callable on q (B, H, N, D), k (B, G, M, D), v (B, Gv, M, Dv); returns (B, H, N, Dv).

    ``pattern`` is what it looks at; ``within`` is what the model lets it look at (causality, padding, the model's
    own window), and no core sees beyond that.
    """

    @property
    def pattern(self) -> Pattern: ...

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        within: Pattern = full,
        bias: Tensor | Bias | None = None,
        weights: Weights | str = "softmax",
        scale: float | None = None,
        softcap: float | None = None,
        layout: Layout | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class PatternCore:
    """Exact attention over a pattern.

    >>> import torch
    >>> from foveate import causal, window
    >>> q = k = v = torch.randn(1, 2, 9, 4)
    >>> PatternCore(window(4))(q, k, v, within=causal).shape
    torch.Size([1, 2, 9, 4])
    """

    pattern: Pattern = full

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        within: Pattern = full,
        bias: Tensor | Bias | None = None,
        weights: Weights | str = "softmax",
        scale: float | None = None,
        softcap: float | None = None,
        layout: Layout | None = None,
        dropout: float = 0.0,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        pattern = joined(self.pattern, within)
        return attend(
            q,
            k,
            v,
            pattern,
            bias=bias,
            weights=weights,
            scale=scale,
            softcap=softcap,
            layout=layout,
            dropout=dropout,
            seed=seed,
        )


def joined(pattern: Pattern, within: Pattern) -> Pattern:
    """``pattern & within`` without needless parts."""
    if within == full:
        return pattern
    return within if pattern == full else pattern & within
