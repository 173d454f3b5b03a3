"""Keys and values of heads that need different numbers of them."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from foveate.cache.keys_values import KVCache, tokens_held
from foveate.patterns.algebra import Pattern
from foveate.patterns.compound import Compound, PerHead, per_head


class Share(NamedTuple):
    """Heads of keys that follow one pattern, and the query heads that read them."""

    queries: slice
    keys: slice
    pattern: Pattern


def shares_of(pattern: Pattern, heads: int, key_heads: int) -> tuple[Share, ...]:
    """Neighbouring heads of keys whose queries follow equal patterns, as one share.

    >>> from foveate import causal, window
    >>> [share.pattern for share in shares_of(per_head([window(3), window(9)]) & causal, 8, 4)]
    [window(3) & causal, window(9) & causal]
    """
    group = heads // key_heads
    numbers = [head * pattern.heads // heads for head in range(heads)]
    of_keys = [
        tuple(of_head(pattern, number) for number in numbers[g * group : (g + 1) * group]) for g in range(key_heads)
    ]
    found, first = [], 0
    for own, same in groupby(of_keys):
        count = len(list(same))
        joint = own[0] if len(set(own)) == 1 else per_head(own * count)
        found.append(Share(slice(first * group, (first + count) * group), slice(first, first + count), joint))
        first += count
    return tuple(found)


def of_head(pattern: Pattern, head: int) -> Pattern:
    """What one head follows.

    >>> from foveate import causal, window
    >>> of_head(per_head([window(3), window(9)]) & causal, 1)
    window(9) & causal
    """
    if isinstance(pattern, PerHead):
        return of_head(pattern.parts[head], head)
    if not isinstance(pattern, Compound):
        return pattern
    return type(pattern)(tuple(of_head(part, head) for part in pattern.parts))


class HeadsCache:
    """A :class:`KVCache` for each share of the heads, each as long as the heads of that share need."""

    __slots__ = ("caches", "shares")

    def __init__(self, batch: int, capacity: int | None, shares: tuple[Share, ...]) -> None:
        self.shares = shares
        self.caches = tuple(KVCache(batch, capacity, share.pattern) for share in shares)

    def _with(self, caches: tuple[KVCache, ...]) -> HeadsCache:
        after = HeadsCache.__new__(HeadsCache)
        after.shares, after.caches = self.shares, caches
        return after

    @property
    def seen(self) -> int:
        return self.caches[0].seen

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    def append(self, k: Tensor, v: Tensor) -> HeadsCache:
        """With the keys and values (B, G, N, D) of the next tokens."""
        pairs = zip(self.caches, self.shares, strict=True)
        return self._with(tuple(cache.append(k[:, share.keys], v[:, share.keys]) for cache, share in pairs))

    def trimmed(self) -> HeadsCache:
        """Without what no later query may see, where there would else be no room."""
        return self._with(tuple(cache.trimmed() for cache in self.caches))


def keys_kept(shares: tuple[Share, ...], length: int) -> int:
    """Keys, over all heads of them, that memory is taken for after so many tokens, with room for as many."""
    return sum((share.keys.stop - share.keys.start) * tokens_held(share.pattern, length) for share in shares)
