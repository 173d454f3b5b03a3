"""Tree attention: softmax attention over keys shared out among ranks, joined by reductions."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.attention import attend, attend_partial
from foveate.catalogue.tiers import parallel


class _Sum(torch.autograd.Function):
    """The sum over all ranks, on each; the gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _whole(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    return attend(q, k, v, scale=scale)


def _inputs(length: int) -> tuple[Tensor, ...]:
    return torch.randn(2, 4, 3, 8), torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 5)


@parallel(
    "tree_attention",
    papers=("Tree Attention",),
    whole=_whole,
    inputs=_inputs,
    axes=(None, -2, -2),
    out=None,
    uneven=True,
    tiny={"scale": 0.4},
)
def tree_attention(q: Tensor, k: Tensor, v: Tensor, *, group: Any = None, scale: float | None = None) -> Tensor:
    """Softmax attention of queries that all ranks have to keys of which each has some, by two all-reduces.

    Every rank attends to its own keys; a maximum and a sum over ranks of B H N (Dv + 1) numbers join what they found,
    exactly, whatever the split. How the reductions travel (a tree, a ring) is the backend's: NCCL's trees make their
    number of rounds logarithmic in the ranks, where a ring of keys takes as many rounds as there are ranks.

    Shyam et al., Tree Attention: Topology-aware Decoding for Long-Context Attention on GPU clusters, arXiv 2408.04093.

    Args:
        q: (B, H, N, D), the same on all ranks: the query of a token to decode, which sees every key.
        k, v: (B, G, M, D) and (B, G, M, Dv), this rank's own; M may differ from rank to rank, and be 0.
        group: the process group, all ranks by default.
        scale: of the logits, 1 / √D by default.

    Returns:
        (B, H, N, Dv), the same on all ranks. Gradients of what all ranks make of it add up: where all compute the same
        loss, let one of them count, or divide by their number. The gradient of q is this rank's share.
    """
    out, lse = attend_partial(q, k, v, scale=scale)
    assert lse is not None
    largest = lse.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    weight = torch.exp(lse - torch.where(largest.isinf(), 0.0, largest)).unsqueeze(-1)
    sums = _Sum.apply(torch.cat([weight * out, weight], dim=-1), group)
    return (sums[..., :-1] / sums[..., -1:]).to(q.dtype)
