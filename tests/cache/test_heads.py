"""Heads that need other numbers of keys keep their own."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from foveate import causal, per_head, sinks, window
from foveate.cache import HeadsCache, shares_of

WINDOWS = per_head([window(4, 0), window(4, 0), window(20, 0), (window(9, 0) | sinks(2))]) & causal


def test_neighbouring_heads_of_one_pattern_share_a_cache() -> None:
    of_four = shares_of(WINDOWS, 4, 4)
    assert [(share.keys, share.queries) for share in of_four] == [
        (slice(0, 2), slice(0, 2)),
        (slice(2, 3), slice(2, 3)),
        (slice(3, 4), slice(3, 4)),
    ]
    of_two = shares_of(WINDOWS, 8, 2)  # two query heads follow each pattern, four read each head of keys
    assert [(share.keys, share.queries, share.pattern.heads) for share in of_two] == [
        (slice(0, 1), slice(0, 4), 1),
        (slice(1, 2), slice(4, 8), 4),
    ]


@torch.no_grad()
def test_each_head_keeps_as_many_keys_as_it_needs() -> None:
    shares = shares_of(WINDOWS, 4, 4)
    cache = HeadsCache(1, None, shares)
    for t in range(300):
        k = torch.full((1, 4, 1, 1), float(t)) + torch.arange(4).view(1, 4, 1, 1) / 8
        cache = cache.append(k, -k).trimmed()
        for share, part in zip(shares, cache.caches, strict=True):
            heads = torch.arange(share.keys.start, share.keys.stop).view(-1, 1) / 8
            assert_close(part.k[0, :, :, 0], part.positions() + heads)  # its own heads' keys
            reach, first = ((4, 0), (20, 0), (9, 2))[shares.index(share)]
            needed = {p for p in range(t + 1) if p < first or p > t - reach}
            assert needed <= set(part.positions().tolist())
    most = {4: 2, 20: 1, 11: 1}  # heads by the number of keys that they need
    assert cache.seen == 300
    assert cache.nbytes <= sum(heads * 2 * 4 * (1.25 * keys + 32) for keys, heads in most.items())
