"""Keys and values among whose blocks each query chooses."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from foveate.attention.key_ranges import KeyRanges
from foveate.cache.keys_values import KVCache
from foveate.cache.tokens import Tokens
from foveate.patterns.algebra import Pattern
from foveate.patterns.ranges import Ranges
from foveate.patterns.rules.choose import pool, score
from foveate.patterns.rules.dynamic import BlockChoice


class BlockCache(KVCache):
    """Every key and value, and the mean key of every whole block, times ``scale``, by which queries choose.

    A query scores the means, a block's worth less than the keys, and reads what it chose: neither its choice nor its
    reading touches the other keys.
    """

    __slots__ = ("chooser", "means", "scale")

    def __init__(self, batch: int, capacity: int | None, chooser: BlockChoice, scale: float) -> None:
        super().__init__(batch, capacity)
        self.chooser, self.scale = chooser, scale
        self.means = Tokens(batch, None if capacity is None else capacity // chooser.block)

    def _with(self, tokens: Tokens, kept: Ranges, seen: int) -> BlockCache:
        after = super()._with(tokens, kept, seen)
        assert isinstance(after, BlockCache)
        after.chooser, after.scale, after.means = self.chooser, self.scale, self.means
        return after

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.means.nbytes

    def append(self, k: Tensor, v: Tensor) -> BlockCache:
        after, block = super().append(k, v), self.chooser.block
        assert isinstance(after, BlockCache)
        known, whole = self.means.length, after.seen // block
        if whole > known:
            after.means = self.means.append(pool(after.k[:, :, known * block : whole * block], block) * self.scale)
        return after

    def last_sees(self, q: Tensor) -> KeyRanges:
        """The chosen blocks, and the last token's own up to it."""
        own, block = (self.seen - 1) // self.chooser.block, self.chooser.block
        if own == 0:
            return KeyRanges.of([((0, self.seen),)])
        means, sought = self.means[0][:, :, :own], self.chooser.sought
        weights = self.chooser.weighed(score(q, means), means.shape[1], None)[:, :, 0]
        if not sought.by_share and 0 < sought.number < own:
            return KeyRanges.of_best(weights, int(sought.number), block, self.seen, own=1)
        return KeyRanges.of_blocks(pad(sought.marks(weights), (0, 1), value=True), block, self.seen)


def chooses_blocks(pattern: Pattern) -> bool:
    """Whether each query chooses blocks before its own, so that means of whole blocks suffice."""
    return isinstance(pattern, BlockChoice) and pattern.causal and pattern.per == "query"
