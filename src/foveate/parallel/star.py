"""Star Attention: hosts read blocks of a context apart, each behind the first block; a query then sees all of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.attention import attend_partial, merge
from foveate.attention.partial import Partial
from foveate.catalogue.tiers import parallel
from foveate.patterns import blocks, causal


class _Gathered(torch.autograd.Function):
    """Every rank's tensor, stacked; the gradient of a rank's own is the sum of what all ranks have for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        found = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, x.contiguous(), group=group)
        return torch.stack(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None


def _context_inputs(length: int) -> tuple[Tensor, ...]:
    q, k, v = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 5)
    return q, k, v, torch.randn(2, 2, 2, 8), torch.randn(2, 2, 2, 5)


def _whole_context(q: Tensor, k: Tensor, v: Tensor, anchor_k: Tensor, anchor_v: Tensor, *, block: int) -> Tensor:
    return star_context(q, k, v, anchor_k, anchor_v, block=block)


@parallel(
    "star_context",
    papers=("Star Attention",),
    whole=_whole_context,
    inputs=_context_inputs,
    axes=(-2, -2, -2, None, None),
    tiny={"block": 2},
)
def star_context(
    q: Tensor, k: Tensor, v: Tensor, anchor_k: Tensor, anchor_v: Tensor, *, block: int, group: Any = None
) -> Tensor:
    """The first phase of Star Attention: each block of a context attends to itself and to the anchor, its first block.

    Nothing is sent: every rank reads the anchor's tokens besides its own, layer by layer, so that it has their keys.
    The first block of the first rank is the anchor itself and sees no other. Positions are the caller's: keys come as
    they were turned.

    Acharya, Jia, Ginsburg, Star Attention: Efficient LLM Inference over Long Sequences, arXiv 2411.17116.

    Args:
        q, k, v: (B, H, N, D), (B, G, N, D) and (B, G, N, Dv), this rank's blocks of ``block`` tokens, in order.
        anchor_k, anchor_v: (B, G, A, D) and (B, G, A, Dv) of the anchor, computed by every rank.
        block: tokens of a block.
        group: the process group, all ranks by default; without any, the context is of one rank.

    Returns:
        (B, H, N, Dv). The keys and values of these tokens are what the rank keeps for the second phase.

    Raises ValueError where this rank's tokens are no whole number of blocks.
    """
    if q.shape[2] % block:
        raise ValueError(f"a rank has whole blocks of {block} tokens; got {q.shape[2]} tokens")
    own = attend_partial(q, k, v, blocks(block) & causal)
    first = block if not dist.is_initialized() or dist.get_rank(group) == 0 else 0
    behind = attend_partial(q[:, :, first:], anchor_k, anchor_v)
    joined = merge([Partial(own.out[:, :, first:], _rows(own, first)), behind]).out
    return torch.cat([own.out[:, :, :first], joined], 2)


def _rows(partial: Partial, first: int) -> Tensor:
    assert partial.lse is not None
    return partial.lse[:, :, first:]


def _query_inputs(length: int) -> tuple[Tensor, ...]:
    q, own_k, own_v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 5)
    return q, torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 5), own_k, own_v


def _whole_query(q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
    return merge([attend_partial(q, k, v), attend_partial(q, own_k, own_v, causal)]).out


@parallel(
    "star_query",
    papers=("Star Attention",),
    whole=_whole_query,
    inputs=_query_inputs,
    axes=(None, -2, -2, None, None),
    out=None,
    uneven=True,
)
def star_query(q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, *, group: Any = None) -> Tensor:
    """The second phase of Star Attention: a query, or generated tokens, attend to all that ranks have kept, exactly.

    Each rank attends to its own keys; the last one holds the keys of the query itself, too. B H N (Dv + 1) numbers of
    every rank are gathered and joined by their log sums. The paper gathers them at one host; here, as in the authors'
    code, every rank has the result.

    Args:
        q: (B, H, N, D) of the last tokens, the same on all ranks.
        k, v: (B, G, M, D) and (B, G, M, Dv) of the context, this rank's own; M may differ, and be 0.
        own_k, own_v: (B, G, N, D) and (B, G, N, Dv) of the last tokens themselves, causal, the same on all ranks.
        group: the process group, all ranks by default.

    Returns:
        (B, H, N, Dv), the same on all ranks. Gradients add up, as those of `tree_attention` do.
    """
    parts = [attend_partial(q, k, v)]
    if dist.get_rank(group) == dist.get_world_size(group) - 1:
        parts.append(attend_partial(q, own_k, own_v, causal))
    out, lse = merge(parts)
    assert lse is not None
    gathered = _Gathered.apply(torch.cat([out.to(lse.dtype), lse.unsqueeze(-1)], -1), group)
    return merge([Partial(one[..., :-1], one[..., -1]) for one in gathered]).out.to(q.dtype)
