"""Sums over tokens that leave padding out."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-6  # least divisor; features are of order 1


def softmax_over_tokens(scores: Tensor, key_mask: Tensor | None, dim: int) -> Tensor:
    """Softmax along ``dim`` over the tokens in ``key_mask``; zeros elsewhere, also where there is none.

    >>> softmax_over_tokens(torch.zeros(1, 3), torch.tensor([[True, False, True]]), 1)
    tensor([[0.5000, 0.0000, 0.5000]])
    """
    if key_mask is None:
        return scores.softmax(dim)
    least = torch.finfo(scores.dtype).min
    return scores.masked_fill(~key_mask, least).softmax(dim).masked_fill(~key_mask, 0)


def hide(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Heads x (B, H, N, D) with zeros in the place of the tokens that are not real (B, N)."""
    return x if key_mask is None else x.masked_fill(~key_mask[:, None, :, None], 0)


def count(key_mask: Tensor | None, num_tokens: int) -> Tensor | int:
    """Real tokens of each sequence, to divide (B, H, N, D) by: (B, 1, 1, 1), at least 1."""
    return max(num_tokens, 1) if key_mask is None else key_mask.sum(1).clamp_min(1).view(-1, 1, 1, 1)
