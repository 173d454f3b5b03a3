"""Computations over process groups, each broken in one way, around a sound one: attention on parts of a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from foveate.catalogue.registry import Reference
from foveate.catalogue.tiers import ParallelRow

BROKEN: dict[str, tuple[ParallelRow, set[str]]] = {}  # and the properties that it lacks


class Gather(torch.autograd.Function):
    """All ranks' parts, one after the other; the gradient of a part is the sum of what all ranks have for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        size = dist.get_world_size(group)
        ctx.group, ctx.place = group, dist.get_rank(group)
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(size)]
        dist.all_gather(lengths, torch.tensor([x.shape[-2]]), group=group)
        ctx.lengths = [int(length) for length in lengths]
        padded = x.new_zeros(*x.shape[:-2], max(ctx.lengths), x.shape[-1])
        padded[..., : x.shape[-2], :] = x
        parts = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[..., :length, :] for part, length in zip(parts, ctx.lengths, strict=True)], -2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.split(ctx.lengths, -2)[ctx.place], None


def sound(q: Tensor, k: Tensor, v: Tensor, *, group: Any, scale: float = 1.0) -> Tensor:
    """Attention of each rank's queries to the keys of all."""
    return whole(q, Gather.apply(k, group), Gather.apply(v, group), scale=scale)


def whole(q: Tensor, k: Tensor, v: Tensor, *, scale: float = 1.0) -> Tensor:
    return (scale * q @ k.mT).softmax(-1) @ v


def inputs(length: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, length, 3) for _ in range(3))


def query_of_all(q: Tensor, k: Tensor, v: Tensor, *, group: Any) -> Tensor:
    """One query that all ranks have, over keys of which each has a part."""
    return whole(q, Gather.apply(k, group), Gather.apply(v, group))


def one_query(length: int) -> tuple[Tensor, ...]:
    return torch.randn(2, 1, 3), *inputs(length)[1:]


NOBODY = Reference("Nobody", "Nothing", "0000.00000")
TINY = {"scale": 0.7}


def row_of(function: Callable[..., Tensor], uneven: bool = True) -> ParallelRow:
    return ParallelRow(
        function.__name__, (), "none", function, whole, inputs, (-2, -2, -2), -2, uneven, reference=NOBODY, tiny=TINY
    )


ONE_QUERY = ParallelRow(
    "query_of_all", (), "none", query_of_all, whole, one_query, (None, -2, -2), None, True, reference=NOBODY
)


def broken(*lacks: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        BROKEN[function.__name__] = row_of(function, "uneven parts" in lacks), set(lacks)
        return function

    return add


@broken("two ranks", "other ranks")
def needs_three(q: Tensor, k: Tensor, v: Tensor, *, group: Any, scale: float) -> Tensor:
    return sound(q, k, v, group=group, scale=scale if dist.get_world_size(group) > 2 else 1.0)


@broken("three ranks")
def needs_pairs(q: Tensor, k: Tensor, v: Tensor, *, group: Any, scale: float) -> Tensor:
    if dist.get_world_size(group) % 2:
        raise ValueError("a tree has pairs")
    return sound(q, k, v, group=group, scale=scale)


@broken("four ranks")
def drops_the_last(q: Tensor, k: Tensor, v: Tensor, *, group: Any, scale: float) -> Tensor:
    seen = 18 if dist.get_world_size(group) == 4 else 24
    return whole(q, Gather.apply(k, group)[:, :seen], Gather.apply(v, group)[:, :seen], scale=scale)


@broken("other ranks")
def knows_the_first_ranks_only(q: Tensor, k: Tensor, v: Tensor, *, group: Any, scale: float) -> Tensor:
    out = sound(q, k, v, group=group, scale=scale)
    return out if dist.get_rank() < dist.get_world_size(group) else out * 0


@broken("gradients")
def cuts_gradients(q: Tensor, k: Tensor, v: Tensor, *, group: Any, scale: float) -> Tensor:
    return whole(q, Gather.apply(k, group).detach(), Gather.apply(v, group), scale=scale)


@broken("uneven parts")
def needs_equal_parts(q: Tensor, k: Tensor, v: Tensor, *, group: Any, scale: float) -> Tensor:
    if dist.get_world_size(group) * q.shape[1] != 24:
        raise ValueError("parts must be of one length")
    return sound(q, k, v, group=group, scale=scale)
