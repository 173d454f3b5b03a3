"""One call of attention: its tensors, what each query sees, and how a contender is run on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from benchmarks.contest import Run
from foveate import attend
from foveate.attention import relative_table
from foveate.attention.bias import RelativeTable
from foveate.patterns import Layout, Pattern, full

Attention = Callable[..., Tensor]  # of q, k, v and, where the problem has one, the bias table


@dataclass(frozen=True, eq=False)
class Problem:
    """q (B, H, N, D), k and v (B, G, M, D); with a cotangent (B, H, N, D) gradients are wanted."""

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Pattern = full
    layout: Layout | None = None
    table: Tensor | None = None  # (H, 2 R + 1, 2 R + 1), a bias on relative positions in a window
    window: tuple[int, int] | None = None
    cotangent: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.q, self.k, self.v) if self.table is None else (self.q, self.k, self.v, self.table)

    @property
    def scale(self) -> float:
        return self.q.shape[3] ** -0.5

    @cached_property
    def pairs(self) -> int:
        """Visible pairs of all batch entries and heads."""
        batch, heads, num_queries, _ = self.q.shape
        if self.pattern == full:
            return batch * heads * num_queries * self.k.shape[2]
        seen = self.pattern.select(self.q, self.k, self.layout)
        return seen.pairs * (batch // seen.batches) * (heads // seen.heads)

    @property
    def operations(self) -> float:
        """Of the two matrix products over visible pairs, and of the five of the backward pass."""
        forward = 4.0 * self.pairs * self.q.shape[3]
        return forward if self.cotangent is None else 3.5 * forward

    @property
    def key_bytes(self) -> int:
        """Bytes of keys and values: what decoding must read."""
        return sum(x.numel() * x.element_size() for x in (self.k, self.v))

    def bias(self, table: Tensor | None = None) -> RelativeTable | None:
        return None if table is None else relative_table(table, self.window)

    def ours(self, impl: str) -> Attention:
        """Foveate's attend."""

        def run(q: Tensor, k: Tensor, v: Tensor, *table: Tensor) -> Tensor:
            return attend(q, k, v, self.pattern, bias=self.bias(*table), layout=self.layout, impl=impl)

        return run

    def run(self, attention: Attention) -> Run:
        """Forward alone, giving (out,), or forward and backward, giving a gradient for each input."""
        return partial(self._forward if self.cotangent is None else self._gradients, attention)

    @torch.no_grad()
    def _forward(self, attention: Attention) -> tuple[Tensor, ...]:
        return (attention(*self.inputs),)

    def _gradients(self, attention: Attention) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(*self.inputs), self.inputs, self.cotangent)


def drawn(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    pattern: Pattern = full,
    *,
    layout: Layout | None = None,
    keys: tuple[int, int] | None = None,
    window: tuple[int, int] | None = None,
    training: bool = False,
) -> Problem:
    """A problem with normal inputs: q of this shape (B, H, N, D), ``keys`` (G, M) like the queries by default.

    >>> from foveate import causal
    >>> drawn((1, 2, 10, 8), torch.float32, causal).pairs
    110
    """
    batch, heads, length, dim = shape
    groups, num_keys = keys or (heads, length)
    sizes = [shape, *[(batch, groups, num_keys, dim)] * 2]
    q, k, v = (torch.randn(size).to(dtype).requires_grad_(training) for size in sizes)
    sides = () if window is None else tuple(2 * side - 1 for side in window)
    table = torch.randn(heads, *sides).to(dtype).requires_grad_(training) if sides else None
    cotangent = torch.randn(shape).to(dtype) if training else None
    return Problem(q, k, v, pattern, layout, table, window, cotangent)
