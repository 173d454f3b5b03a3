"""A cache keeps every key that a later query may see, and little else."""

from __future__ import annotations

import random

import pytest
import torch
from torch.testing import assert_close

from foveate import Pattern, blocks, causal, dilated, full, per_head, power_of_two, prefix, sinks, strided, window
from foveate.cache import KVCache

LENGTH = 400
BOUNDED: dict[str, tuple[Pattern, int]] = {  # and how many keys may be needed at once
    "window": (window(9, 0), 9),
    "a window both ways": (window(9, 3) & causal, 9),
    "sinks": ((sinks(3) | window(9, 0)) & causal, 12),
    "windows of heads": (per_head([window(4, 0), window(20, 0)]) & causal, 20),
    "blocks": (blocks(8) & causal, 7),
    "dilated": (dilated(3, 4) & causal, 12),
    "prefix": ((prefix(5) | window(2, 0)) & causal, 7),
    "a window within a window": (window(30, 0) & window(7) & causal, 7),
}
UNBOUNDED: dict[str, Pattern] = {
    "all": full & causal,
    "powers": (power_of_two(4) | window(3, 0)) & causal,
    "strided": strided(5) & causal,
    "all but a window": ~window(3) & causal,
}
PATTERNS = {name: pattern for name, (pattern, _) in BOUNDED.items()} | UNBOUNDED


@pytest.mark.parametrize("name", PATTERNS)
@torch.no_grad()
def test_keys_that_a_later_query_sees_are_kept(name: str) -> None:
    pattern = PATTERNS[name]
    seen = pattern.mask(LENGTH).any(1)[0]  # (N, M): by some head
    numbers = torch.arange(LENGTH, dtype=torch.float64).view(1, 1, -1, 1)
    cache, at = KVCache(1, pattern=pattern), 0
    while at < LENGTH:
        step = min(random.choice((1, 1, 1, 2, 17)), LENGTH - at)
        cache = cache.append(numbers[:, :, at : at + step], -numbers[:, :, at : at + step])
        at += step
        for kept in (cache, cache.trimmed()):
            positions = kept.positions()
            assert kept.seen == at
            assert_close(kept.k.flatten(), positions.double())  # keys are where the cache says
            assert_close(kept.v.flatten(), -positions.double())
            needed = seen[at:, :at].any(0).nonzero().flatten()
            assert set(needed.tolist()) <= set(positions.tolist())
        cache = cache.trimmed()


@pytest.mark.parametrize("name", BOUNDED)
@torch.no_grad()
def test_memory_is_bounded(name: str) -> None:
    pattern, most = BOUNDED[name]
    for capacity in (None, 10**6):
        cache = KVCache(1, capacity, pattern)
        token = torch.zeros(1, 1, 1, 2)
        for _ in range(LENGTH):
            cache = cache.append(token, token).trimmed()
            assert cache.nbytes <= 2 * 2 * 4 * (1.25 * most + 32)
        cache = cache.append(*torch.zeros(2, 1, 1, 1000, 2)).trimmed()  # nor is a long prompt kept
        assert cache.nbytes <= 2 * 2 * 4 * (1.25 * most + 32)


@torch.no_grad()
def test_slots_are_those_of_positions() -> None:
    pattern = (sinks(3) | window(9, 0)) & causal
    cache = KVCache(1, pattern=pattern)
    for t in range(LENGTH):
        token = torch.full((1, 1, 1, 1), float(t))
        cache = cache.append(token, token).trimmed()
        wanted = ((0, min(3, t + 1)), (max(t - 5, 3), t + 1)) if t >= 3 else ((0, t + 1),)
        found = [x for a, b in cache.slots(wanted) for x in cache.k[0, 0, a:b, 0].tolist()]
        assert found == [p for a, b in wanted for p in range(a, b)]
