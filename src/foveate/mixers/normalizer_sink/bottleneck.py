"""TAB: one head through which all that a class token learns of an image must pass, and which may be shut."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from foveate.attention import attend_partial
from foveate.catalogue.registry import register
from foveate.mixers.base import Mixer
from foveate.patterns import Layout
from foveate.precision import to_accum


class Looked(NamedTuple):
    """The class token's output (B, C), and its weights (B, M) on the keys, which sum to 1 at most."""

    out: Tensor
    attention: Tensor


@register(
    "attention_bottleneck",
    papers=("TAB",),
    formula="o_0 = (1 - a_00) Σ_j a_0j v_j, o_i = Σ_j a_ij v_j, a_ij = softmax_j(q_i·k_j / √C); no residual",
    supports={"noncausal", "cross", "padding"},
)
class AttentionBottleneck(Mixer):
    """Attention of one head, whose class token, the first, attends the less the more it attends to the keys' first.

    The weights of the class token's row are multiplied by one minus its weight on key 0, a class token too: where it
    attends to that alone, nothing passes. Nothing bypasses the layer, so put it where there is no residual connection,
    after a vision encoder's layers; x is one image with its class token in front, the context another, or x itself.

    :meth:`look` returns the class token's output with its weights, or takes weights edited by a user: zeros give
    exactly zero.

    >>> tab, x = AttentionBottleneck(8), torch.randn(1, 5, 8)
    >>> seen = tab.look(x)
    >>> torch.allclose(seen.out, tab(x)[:, 0], atol=1e-6), bool(seen.attention.sum() < 1)
    (True, True)
    >>> tab.look(x, attention=torch.zeros(1, 5)).out.abs().max().item()
    0.0

    Rahmanzadehgervi, Nguyen, Liu, Mai, Nguyen, TAB: Transformer Attention Bottlenecks, arXiv 2412.18675; rows and their
    gate as in the authors' published code, without its biases, so that no attention is no output.
    """

    def __init__(self, dim: int, *, causal: bool = False) -> None:
        super().__init__(dim, causal=causal)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        for layer in (self.to_q, self.to_k, self.to_v):
            nn.init.xavier_uniform_(layer.weight)

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        first_key = _first(x if context is None else context, padding)
        first_query = first_key if context is None else torch.zeros_like(first_key)
        context = x if context is None else context
        q, k, v = (y.unsqueeze(1) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        out, lse = attend_partial(q, k, v, self.within(padding))
        assert lse is not None
        rows = torch.arange(x.shape[1], device=x.device).unsqueeze(0) == first_query.unsqueeze(1)
        key = k.squeeze(1).take_along_dim(first_key.view(-1, 1, 1), 1) if k.shape[2] else k.new_zeros(len(k), 1, 1)
        logits = (to_accum(q.squeeze(1)) * to_accum(key)).sum(-1) * self.dim**-0.5
        empty = lse[:, 0].isneginf()
        shares = torch.exp(torch.where(empty, float("-inf"), logits - torch.where(empty, 0, lse[:, 0])))
        gates = torch.where(rows, 1 - shares, 1).to(out.dtype)
        return self.to_out(out.squeeze(1) * gates.unsqueeze(-1))

    def look(self, x: Tensor, context: Tensor | None = None, *, attention: Tensor | None = None) -> Looked:
        """What the class token reads, with its weights (B, M); ``attention`` takes their place where it is given."""
        self.check(x, context, None, None)
        context = x if context is None else context
        if attention is None:
            q, k = to_accum(self.to_q(x[:, :1])), to_accum(self.to_k(context))
            weights = torch.softmax((q @ k.mT).squeeze(1) * self.dim**-0.5, -1)
            attention = weights * (1 - weights[:, :1])
        elif attention.shape != context.shape[:2]:
            raise ValueError(f"attention is {tuple(context.shape[:2])}, a weight a key; got {tuple(attention.shape)}")
        read = attention.to(context.dtype).unsqueeze(1) @ self.to_v(context)
        return Looked(self.to_out(read).squeeze(1), attention)


def _first(tokens: Tensor, padding: Tensor | None) -> Tensor:
    """The place of each sequence's first token that is real, (B,)."""
    if padding is None or not padding.shape[1]:
        return torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    return padding.int().argmax(1)
