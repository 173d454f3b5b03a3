"""What a few queries attend to: statistics that say which tokens of a cache matter, without a table of all pairs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from foveate.attention import Weights
from foveate.cache.memory import Look


def last_rows(q: Tensor, look: Look, count: int) -> tuple[Tensor, Look]:
    """The last ``count`` tokens of each text among those of a call: their queries (B, H, R, D), and their look.

    A text with fewer of them has rows of padding before them, which see nothing.
    """
    count = min(count, q.shape[2])
    rows = look.position.topk(count, dim=1).indices.sort(dim=1).values  # padding is FREE, below every position
    return rows_of(q, look, rows)


def rows_of(q: Tensor, look: Look, rows: Tensor) -> tuple[Tensor, Look]:
    """The queries (B, H, R, D) of a call at rows (B, R), and their look."""
    index = rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    position = look.position.gather(1, rows)
    return q.gather(2, index), replace(look, position=position, padded=True)


def weights_of_rows(q: Tensor, k: Tensor, position: Tensor, look: Look, beside: Tensor | None = None) -> Tensor:
    """Attention weights (B, H, R, M) of a few queries (B, H, R, D) to keys (B, G, M, D) at positions (B, G, M).

    Of the model's own kind: its scale, soft-cap, bias by distance, sliding window, and a sink that takes weight away.
    ``beside`` (B, H, R) is the log of the sum of weights of further keys. Rows of padding are zeros. In float32 at
    least.

    Raises NotImplementedError for weights other than softmax.
    """
    weights = look.options.get("weights", "softmax")
    if (weights.kind if isinstance(weights, Weights) else weights) != "softmax":
        raise NotImplementedError(f"which tokens matter is read off softmax weights; this layer has {weights}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads = (k.shape[1], q.shape[1] // k.shape[1])
    products = q.to(dtype).unflatten(1, heads).flatten(2, 3) @ k.to(dtype).mT  # (B, G, r R, M)
    products = products.unflatten(2, (heads[1], -1)).flatten(1, 2)
    logits = logits_of(products, position, look, q.shape[3])
    sink = weights.sink if isinstance(weights, Weights) else None
    others = [] if sink is None else [sink.to(dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)]
    others += [] if beside is None else [beside.to(dtype).unsqueeze(3)]
    never = logits.new_full((*logits.shape[:3], 1), float("-inf"))
    total = torch.cat([logits, never, *others], 3).logsumexp(3, keepdim=True)
    return (logits - total).exp().masked_fill(logits.isinf(), 0.0)


def logits_of(products: Tensor, position: Tensor, look: Look, dim: int) -> Tensor:
    """Logits (B, H, R, M) of products q k^T of ``dim`` channels, with keys at positions (B, G, M); -inf if unseen."""
    options = look.options_at(position)
    scale = options.get("scale")
    logits = products * (dim**-0.5 if scale is None else scale)
    softcap = options.get("softcap")
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    bias = options.get("bias")
    if bias is not None:
        logits = logits + bias
    seen = look.visible(position).repeat_interleave(logits.shape[1] // position.shape[1], dim=1)
    return logits.masked_fill(~seen, float("-inf"))


def of_key_heads(x: Tensor, heads: int) -> Tensor:
    """Means (B, G, ...) over the query heads (B, H, ...) that read each of ``heads`` key heads."""
    return x.unflatten(1, (heads, -1)).mean(2)
