"""A cache among whose blocks queries choose: by means of whole blocks, reading nothing else."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nan
from torch.testing import assert_close

from foveate import topk_blocks
from foveate.attention.ranges import attend_ranges
from foveate.cache import BlockCache
from foveate.mixers.core import PatternCore

H, G, D, BLOCK, K = 6, 3, 8, 5, 4


def cached(k: Tensor, v: Tensor) -> BlockCache:
    """Keys and values appended in pieces of any lengths."""
    pattern = PatternCore(topk_blocks(BLOCK, K)).pattern
    cache, at = BlockCache(len(k), None, pattern, D**-0.5), 0  # type: ignore[arg-type]
    while at < k.shape[2]:
        end = min(at + random.choice((1, 1, 3, 19)), k.shape[2])
        cache = cache.append(k[:, :, at:end], v[:, :, at:end])
        at = end
    return cache


def chosen(q: Tensor, k: Tensor) -> Tensor:
    """The keys that the last query sees, (B, H, M): its own block, and the best by mean keys before it."""
    length = k.shape[2]
    own = (length - 1) // BLOCK
    keys = k.repeat_interleave(H // G, 1)
    seen = torch.zeros(len(q), H, length, dtype=torch.bool)
    seen[:, :, own * BLOCK :] = True
    for b in range(len(q)):
        for h in range(H):
            means = [keys[b, h, c * BLOCK : (c + 1) * BLOCK].mean(0) for c in range(own)]
            best = sorted(range(own), key=lambda c: -float(q[b, h, 0] @ means[c]))[: K - 1]
            for c in best:
                seen[b, h, c * BLOCK : (c + 1) * BLOCK] = True
    return seen


@pytest.mark.parametrize("length", [1, 5, 6, 21, 60, 93])
@torch.no_grad()
def test_the_last_query_sees_its_block_and_the_best_before(length: int) -> None:
    q, k, v = (torch.randn(2, heads, n, D, dtype=torch.float64) for heads, n in ((H, 1), (G, length), (G, length)))
    cache = cached(k, v)
    seen = cache.last_sees(q)
    mask = seen.mask(length, q.device).squeeze(2)
    mask = mask.expand(2, -1, -1).repeat_interleave(H // mask.shape[1], 1)
    assert torch.equal(mask, chosen(q, k))
    assert cache.means.length == length // BLOCK


@torch.no_grad()
def test_no_other_key_is_read() -> None:
    q, k, v = (torch.randn(1, heads, n, D) for heads, n in ((H, 1), (G, 93), (G, 93)))
    cache = cached(k, v)
    seen = cache.last_sees(q)
    read = chosen(q, k).view(1, G, H // G, 93).any(2)
    expected = attend_ranges(q, k, v, seen)
    cache.k[~read], cache.v[~read] = nan, nan  # what is chosen by is kept apart
    assert_close(attend_ranges(q, cache.k, cache.v, cache.last_sees(q)), expected, rtol=0, atol=0)
