"""Which of MInference's patterns suits which head, found offline under a budget."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.attention import attend
from foveate.mixers.core import joined
from foveate.mixers.dynamic_sparse.minference import AShape
from foveate.patterns import Pattern, causal
from foveate.patterns.rules.dynamic import topk_blocks, vertical_slash


class HeadSearch(NamedTuple):
    """The best pattern's name for each head, and the relative error of each (H, patterns)."""

    assignment: tuple[str, ...]
    errors: Tensor


def patterns_under(budget: float, length: int) -> dict[str, Pattern]:
    """The three patterns at one cost: at most the fraction ``budget`` of causal attention's pairs each.

    >>> patterns_under(0.25, 8192)["a_shape"]
    sinks(137) | window(959, 0)

    Raises ValueError unless 0 < budget <= 1 and length is at least 1.
    """
    if not 0 < budget <= 1 or length < 1:
        raise ValueError(f"a budget is a fraction in (0, 1], of a length of at least 1; got {budget}, {length}")
    # rows see min(i + 1, width) keys: n * width - width * (width - 1) / 2 pairs of n * (n + 1) / 2
    half = length + 0.5
    width = max(int(half - math.sqrt(half**2 - budget * length * (length + 1)) + 1e-9), 1)
    block = min(64, width)
    vertical, slash, count = width // 2, width - width // 2, width // block
    if width >= length:
        vertical, slash, count = length, length, -(-length // block)
    return {
        "a_shape": AShape.pattern(sinks=width // 8, window=width - width // 8),
        "vertical_slash": vertical_slash(max(vertical, 1), slash),
        "block_sparse": topk_blocks(block, count, per="block"),
    }


@torch.no_grad()
def search_heads(
    q: Tensor, k: Tensor, v: Tensor, *, budget: float = 0.25, within: Pattern = causal, scale: float | None = None
) -> HeadSearch:
    """The pattern under one budget that brings each head's output nearest to full attention on a sample.

    >>> q = k = v = torch.randn(1, 2, 65, 8)
    >>> len(search_heads(q, k, v).assignment)
    2

    q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv) are one layer's of a sample of real text.
    """
    patterns = patterns_under(budget, k.shape[2])
    exact = attend(q, k, v, within, scale=scale)
    size = exact.square().sum((0, 2, 3)).clamp_min(torch.finfo(exact.dtype).tiny)
    errors = []
    for pattern in patterns.values():
        out = attend(q, k, v, joined(pattern, within), scale=scale)
        errors.append(((out - exact).square().sum((0, 2, 3)) / size).sqrt())
    table = torch.stack(errors, dim=1)
    names = list(patterns)
    return HeadSearch(tuple(names[best] for best in table.argmin(1).tolist()), table)
