"""Bits per byte of a causal language model on a text, with full attention or a sliding window."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def bits_per_byte(model: Any, tokenizer: Any, text: str, *, context: int, window: int | None = None) -> float:
    """Mean bits per byte of `text`, read in pieces of `context` tokens (the last, shorter piece left out).

    With `window`, each token sees itself and the `window - 1` tokens before it.
    """
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    if len(ids) < context:
        raise ValueError(f"a context of {context} tokens needs a longer text: this one has {len(ids)} tokens")
    return bits_per_byte_of(ids, model, tokenizer, context=context, window=window)


def bits_per_byte_of(ids: Tensor, model: Any, tokenizer: Any, *, context: int, window: int | None = None) -> float:
    """The same for tokens (N,) int64."""
    pieces = ids[: len(ids) // context * context].view(-1, context)  # (pieces, context)
    bits = sum(token_bits(model, piece, window=window).sum().item() for piece in pieces)
    size = sum(len(tokenizer.decode(piece[1:]).encode()) for piece in pieces)
    return bits / size


@torch.no_grad()
def token_bits(model: Any, ids: Tensor, *, window: int | None = None) -> Tensor:
    """Bits that each token but the first costs, given those before it: (N,) int64 to (N - 1,) float32."""
    mask = None if window is None else window_mask(len(ids), window)
    logits = model(input_ids=ids[None], attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits[0, :-1].float(), ids[1:], reduction="none") / math.log(2)


def window_mask(length: int, window: int) -> Tensor:
    """The boolean (1, 1, N, N) mask of a causal sliding window."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    return ((distance >= 0) & (distance < window))[None, None]
