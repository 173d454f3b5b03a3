"""LongSpec's draft model: one layer over a target's embeddings and last keys, with a cache of constant size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from foveate.attention import attend
from foveate.cache import KVCache
from foveate.cache.memory import Turn
from foveate.cache.tree import tree_attention
from foveate.mixers.base import join_heads, split_heads
from foveate.models.lm.decoder import GatedLinear
from foveate.patterns import boolean_mask, causal, window


class Grown(NamedTuple):
    """Keys and values (1, G, T, D) of a tree's nodes."""

    k: Tensor
    v: Tensor


class Draft(nn.Module):
    """Window self-attention, cross-attention to the keys and values of the target's last layer, and a gated MLP.

    Embeddings and the output layer are the target's, frozen. Its own cache is that of the window.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int, head_dim: int, hidden: int, *, window: int = 512, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.window = heads, kv_heads, head_dim, window
        self.norm, self.cross_norm, self.channels_norm = (nn.RMSNorm(dim, eps=eps) for _ in range(3))
        self.to_q = nn.Linear(dim, heads * head_dim)
        self.to_k, self.to_v = (nn.Linear(dim, kv_heads * head_dim) for _ in range(2))
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)
        self.cross_q, self.cross_out = nn.Linear(dim, heads * head_dim), nn.Linear(heads * head_dim, dim, bias=False)
        self.channels = GatedLinear(dim, hidden)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @classmethod
    def of(cls, model: nn.Module, window: int = 512) -> Draft:
        """An untrained draft of a target's sizes, a causal language model of transformers."""
        config: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        hidden = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
        made = cls(config.hidden_size, heads, kv_heads, width, hidden, window=window)
        return made.to(device=weight.device, dtype=weight.dtype)

    def init_state(self) -> KVCache:
        return KVCache(1, None, window(self.window, 0) & causal)

    def keys(self, x: Tensor, at: Tensor, turn: Turn | None) -> Grown:
        """Keys and values of embedded tokens x (B, N, C) at positions (1, N): these need nothing but the tokens."""
        y = self.norm(x)
        k, v = (split_heads(layer(y), self.kv_heads) for layer in (self.to_k, self.to_v))
        return Grown(k if turn is None else turn(k, at), v)

    def grow(
        self,
        x: Tensor,
        at: Tensor,
        turn: Turn | None,
        kept: KVCache,
        tree: Grown,
        ancestors: Tensor,
        target: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Nodes x (1, N, C) at positions (1, N), the last of a tree whose keys ``tree`` has: (1, N, C).

        ``ancestors`` (N, T) says whom each sees; ``target`` are the keys and values of the text verified so far.
        """
        q = self.queries(self.to_q(self.norm(x)), at, turn)
        apart = at[0].unsqueeze(1) - kept.positions()
        near = boolean_mask((apart <= self.window)[None, None])
        x = x + self.to_out(join_heads(tree_attention(q, kept.k, kept.v, *tree, ancestors, near=near)))
        q = self.queries(self.cross_q(self.cross_norm(x)), at, turn)
        x = x + self.cross_out(join_heads(attend(q, *target)))
        return x + self.channels(self.channels_norm(x))

    def forward(self, x: Tensor, at: Tensor, turn: Turn | None, target: tuple[Tensor, Tensor], lag: int) -> Tensor:
        """Embedded tokens x (B, N, C) at positions (1, N) in training: (B, N, C).

        ``target`` has the keys and values (B, G, N, D) of the same tokens; those of the last ``lag`` are not yet
        verified where a token is drafted, so that it sees them ``lag`` tokens back.
        """
        q = self.queries(self.to_q(self.norm(x)), at, turn)
        heads = attend(q, *self.keys(x, at, turn), window(self.window, 0) & causal)
        x = x + self.to_out(join_heads(heads))
        q = self.queries(self.cross_q(self.cross_norm(x)), at, turn)
        k, v = (one[:, :, : one.shape[2] - lag] for one in target)
        seen = attend(q[:, :, lag:], k, v, causal)
        x = x + self.cross_out(join_heads(torch.cat([torch.zeros_like(q[:, :, :lag]), seen], 2)))
        return x + self.channels(self.channels_norm(x))

    def queries(self, x: Tensor, at: Tensor, turn: Turn | None) -> Tensor:
        q = split_heads(x, self.heads)
        return q if turn is None else turn(q, at)


def anchor_offset(length: int, offset: int, anchors: int = 4) -> Tensor:
    """Positions (length,) of a short text as a part of a long one: the first few at 0, the rest ``offset`` further on.

    A model trained on short texts at random offsets meets the positions of long ones, and keeps its first tokens, which
    attention leans on, where they are.

    >>> anchor_offset(7, 100)
    tensor([  0,   1,   2,   3, 104, 105, 106])
    """
    if length < 0 or offset < 0 or anchors < 0:
        raise ValueError(f"length, offset and anchors are 0 or more; got {length}, {offset} and {anchors}")
    at = torch.arange(length)
    return torch.where(at < anchors, at, at + offset)


def draft_loss(
    model: nn.Module, draft: Draft, tokens: Tensor, *, lag: int = 1, offset: int = 0, anchors: int = 4
) -> Tensor:
    """Cross-entropy of the next tokens of texts (B, N) by the draft, whose target is a model of transformers.

    ``lag`` of 1 to 4, drawn anew for each batch, is what the authors train with: the number of tokens by which the
    target's keys are behind; ``offset`` and ``anchors`` are :func:`anchor_offset`'s.
    """
    target: Any = model
    at = anchor_offset(tokens.shape[1], offset, anchors).to(tokens.device)
    with torch.no_grad():
        given = {"attention_mask": torch.ones_like(tokens), "position_ids": at.expand_as(tokens)}
        last = target(tokens, use_cache=True, **given).past_key_values.layers[-1]
        x = target.get_input_embeddings()(tokens)
    found = draft(x, at[None], turn_of(model), (last.keys, last.values), lag)
    head = target.get_output_embeddings()  # frozen
    logits = linear(found, head.weight.detach(), None if head.bias is None else head.bias.detach())
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def turn_of(model: nn.Module) -> Turn | None:
    """The rotary embedding of a model's last layer; None where it has none."""
    from foveate.adapt.hf.layers import attention_layers
    from foveate.adapt.hf.rotary import rotary_of

    layer = attention_layers(model)[0][-1]
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    return rotary_of(model, layer.module, config)
