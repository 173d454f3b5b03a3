"""Tree attention of drafted tokens behind a text, and a cache to which only accepted ones are added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.attention import Weights, attend_partial, merge
from foveate.attention.partial import with_sink
from foveate.cache.memory import LayerMemory, Look
from foveate.cache.slots import Slots
from foveate.patterns import Pattern, boolean_mask, full


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree_k: Tensor,
    tree_v: Tensor,
    ancestors: Tensor,
    *,
    near: Pattern = full,
    **options: Any,
) -> Tensor:
    """Attention of nodes of a tree to the text before it and to their ancestors: LongSpec's hybrid tree attention.

    The text is read as by any decoding step, without a mask; the few nodes by a mask; both are joined exactly by their
    log sums. Yang et al., LongSpec, arXiv 2502.17421.

    Args:
        q: (B, H, N, D) of N nodes.
        k, v: (B, G, M, D) and (B, G, M, Dv) of the text, which all nodes see (those that ``near`` shows them).
        tree_k, tree_v: (B, G, T, D) and (B, G, T, Dv) of all nodes.
        ancestors: (N, T), True where a node sees another, itself included.
        near: what nodes see of the text.
        options: of ``attend``: scale, softcap, weights (softmax, with a sink or without).

    Returns:
        (B, H, N, Dv).

    >>> q, k, v = torch.randn(3, 1, 2, 9, 8).unbind(0)
    >>> ancestors = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    >>> tree_attention(q[:, :, 6:], k[:, :, :6], v[:, :, :6], k[:, :, 6:], v[:, :, 6:], ancestors).shape
    torch.Size([1, 2, 3, 8])
    """
    weights = options.get("weights")
    plain = options | {"weights": "softmax"}
    prefix = attend_partial(q, k, v, near, **plain)
    joined = merge([prefix, attend_partial(q, tree_k, tree_v, boolean_mask(ancestors), **plain)])
    sink = weights.sink if isinstance(weights, Weights) else None
    return (joined if sink is None else with_sink(joined, sink)).out


@dataclass
class Tree:
    """The tree that a model verifies now, shared by its layers' memories: (T, T) whom each node sees, None for none."""

    ancestors: Tensor | None = None


class TreeMemory(LayerMemory):
    """A cache of all tokens; those that come while a tree is verified are added once `accept` says which stay."""

    def __init__(self, tree: Tree) -> None:
        super().__init__()
        self.tree = tree
        self.leaves: tuple[Tensor, Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, look: Look) -> Tensor:
        if self.tree.ancestors is None:
            return super().attend(q, k, v, look)
        if look.width is not None or look.options.get("bias") is not None:
            raise NotImplementedError("drafts are verified by layers that see everything, without a bias by distance")
        self.commit()
        assert self.slots is not None
        self.leaves = (k, v)
        options = {name: value for name, value in look.options.items() if name != "bias"}
        return tree_attention(q, self.slots.k, self.slots.v, k, v, self.tree.ancestors, **options)

    def accept(self, nodes: Tensor) -> None:
        """Of the tree verified last, these nodes (a path from its root) go on the text."""
        assert self.leaves is not None and self.slots is not None
        k, v = (one[:, :, nodes] for one in self.leaves)
        at = torch.arange(self.seen, self.seen + len(nodes), device=k.device)
        self.slots: Slots | None = self.slots.append(k, v, at.expand(*k.shape[:2], -1))
        self.seen += len(nodes)
        self.leaves = None
