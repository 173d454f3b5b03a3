"""Heads of unequal sparsity shared out among ranks so that none waits long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foveate.counts import whole_numbers


@dataclass(frozen=True)
class Partition:
    """Which heads each of several groups of ranks has; the ranks of a group share its queries out evenly.

    ``slowest`` is the greatest load of a rank over the mean: 1 is perfect.
    """

    heads: tuple[tuple[int, ...], ...]
    sequence: int  # ranks to a group
    slowest: float


def balanced(loads: Sequence[float], ranks: int, *, sequence: int | None = None) -> Partition:
    """Share heads of these loads (pairs to compute, or seconds) out among ranks, by heads and by queries.

    Heads go to groups of ``sequence`` ranks, from the heaviest to the lightest each to the group of the least load so
    far; inside a group each rank has an equal part of every head's queries. Without ``sequence`` the fewest ranks to a
    group are taken whose slowest rank has at most a tenth more than the mean, since each rank more to a group sends
    more keys about, and the best if none does.

    Tan et al., DSV: Exploiting Dynamic Sparsity to Accelerate Large-Scale Video DiT Training, arXiv 2502.07590.

    >>> balanced([8, 1, 1, 6], 2)
    Partition(heads=((0,), (3, 1, 2)), sequence=1, slowest=1.0)

    Raises ValueError for loads that are negative or none, and for ranks that groups do not divide.
    """
    if not loads or min(loads) < 0:
        raise ValueError(f"each head has a load of at least 0; got {list(loads)}")
    (ranks,) = whole_numbers("numbers of ranks", [ranks])
    if ranks < 1 or (sequence is not None and (sequence < 1 or ranks % sequence)):
        raise ValueError(f"ranks are whole groups of at least one; got {ranks} ranks, {sequence} to a group")
    sizes = [sequence] if sequence is not None else [size for size in range(1, ranks + 1) if ranks % size == 0]
    found = [_of_groups(loads, ranks // size, size) for size in sizes]
    return next((each for each in found if each.slowest <= 1.1), min(found, key=lambda each: each.slowest))


def _of_groups(loads: Sequence[float], groups: int, sequence: int) -> Partition:
    heads: list[list[int]] = [[] for _ in range(groups)]
    totals = [0.0] * groups
    for head in sorted(range(len(loads)), key=lambda head: -loads[head]):
        least = min(range(groups), key=totals.__getitem__)
        heads[least].append(head)
        totals[least] += loads[head]
    mean = sum(loads) / groups
    return Partition(tuple(map(tuple, heads)), sequence, max(totals) / mean if mean else 1.0)
