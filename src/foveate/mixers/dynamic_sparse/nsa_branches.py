"""Parts of Native Sparse Attention: blocks compressed to single keys, and blocks chosen by their weights."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from foveate import autodiff
from foveate.attention.key_ranges import KeyRanges
from foveate.attention.partial import sum_of
from foveate.counting import drawn
from foveate.patterns import Pattern, block_mask, causal
from foveate.patterns.algebra import Bounds, Boxes, Index
from foveate.patterns.rules.choose import NEVER, Sought, choose_rows, score, slices
from foveate.patterns.rules.decided import block_table, no_rows, rows_per_word, words_of
from foveate.plain import traced
from foveate.precision import to_accum


class Compressor(nn.Module):
    """A learned map from overlapping blocks of tokens (B, G, M, D) to one token each (B, G, C, D).

    Every token of a block first gets the embedding of its place inside the block.
    """

    def __init__(self, block: int, stride: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.block, self.stride = block, stride
        self.place = nn.Parameter(torch.randn(block, head_dim) * 0.02)
        self.up = nn.Linear(block * head_dim, hidden)
        self.down = nn.Linear(hidden, head_dim, bias=False)  # one on keys would shift all logits alike

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] < self.block:
            return x[:, :, :0]
        blocks = x.unfold(2, self.block, self.stride).transpose(3, 4) + self.place  # (B, G, C, block, D)
        return self.down(gelu(self.up(blocks.flatten(3))))


def num_blocks(num_tokens: int, block: int, stride: int) -> int:
    """Whole blocks of ``block`` tokens, a new one every ``stride``."""
    return max((num_tokens - block) // stride + 1, 0)


@dataclass(frozen=True, eq=False, repr=False)
class Finished(Pattern):
    """Compressed blocks that end at or before the query, whose token sits ``lead`` beyond its position."""

    block: int
    stride: int
    lead: int

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"finished({self.block}, {self.stride}, lead={self.lead})"

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return k * self.stride + self.block <= q + self.lead + 1

    def bounds(self, boxes: Boxes) -> Bounds:
        at = boxes.position
        some = at.k_lo * self.stride + self.block <= at.q_hi + self.lead + 1
        return Bounds(some, every=at.k_hi * self.stride + self.block <= at.q_lo + self.lead + 1)


@dataclass(frozen=True)
class BlockSelector:
    """Chooses blocks of ``size`` tokens by the softmax weights of the compressed blocks that overlap them.

    Weights are summed over the query heads of a group, so that the group reads the same blocks. The first
    ``initial`` blocks and the last ``local`` ones, the query's own included, are always among the ``count``.
    """

    block: int
    stride: int
    size: int
    count: int
    initial: int
    local: int

    def __post_init__(self) -> None:
        if min(self.block, self.stride, self.size, self.local) < 1 or self.initial < 0:
            raise ValueError(f"block, stride, select_block and local are at least 1, initial 0; got {self}")
        if self.block % self.stride or self.size % self.stride or self.block > self.size:
            raise ValueError(
                f"stride must divide block and select_block, and block be at most select_block;"
                f" got {self.stride}, {self.block} and {self.size}"
            )
        if self.count < self.initial + self.local:
            raise ValueError(
                f"select must leave room for the {self.initial} initial and {self.local} local blocks; got {self.count}"
            )

    @torch.no_grad()
    def choose(self, q: Tensor, compressed: Tensor, num_keys: int) -> Pattern:
        """The chosen blocks, up to the query, for the last queries (B, H, N, D) of ``num_keys`` tokens."""
        q, compressed = drawn(q, compressed)
        if traced(q, compressed):
            table = _chosen_blocks(q, compressed, num_keys, list(astuple(self)))
            return block_mask(table, self.size, q_block=1) & causal
        words, offset = self.words(q, compressed, num_keys), num_keys - q.shape[2]
        return block_table(words, q.shape[2], q_block=1, k_block=self.size, q_start=offset) & causal

    def words(self, q: Tensor, compressed: Tensor, num_keys: int) -> Tensor:
        """The choices of all queries, packed."""
        offset, (batch, heads, num_queries, dim) = num_keys - q.shape[2], q.shape
        keys = to_accum(compressed) * dim**-0.5
        shape = (batch, keys.shape[1], num_queries, -(-num_keys // self.size))
        words = no_rows(*shape, q_block=1, device=q.device)
        for part in slices(num_queries, batch * heads * keys.shape[2]):
            first, last = offset + part.start, offset + part.stop - 1
            finished = num_blocks(last + 1, self.block, self.stride)
            weights = self.weights(score(q[:, :, part], keys[:, :, :finished]), first)
            of_groups = weights.unflatten(1, (keys.shape[1], -1)).sum(2)
            ranked = self.ranked(self.importance(of_groups, last // self.size + 1), first)
            choose_rows(ranked, Sought(self.count), words_of(words, part, 1), 1)
        return words

    def weights(self, scores: Tensor, first: int) -> Tensor:
        """Softmax over the compressed blocks (last dim) that end at or before each query, of which one is ``first``."""
        known = num_blocks(first + 1, self.block, self.stride)  # the others end between the queries
        end = torch.arange(known, scores.shape[-1], device=scores.device) * self.stride + self.block
        place = torch.arange(first, first + scores.shape[-2], device=scores.device).unsqueeze(1)
        scores[..., known:].masked_fill_(end > place + 1, NEVER)
        return torch.softmax(scores, -1)  # not a number where none has ended: only the block that is read anyway

    def ranked(self, importance: Tensor, first: int) -> Tensor:
        """The importance of the blocks (last dim), endless where each query surely reads them."""
        importance[..., : self.initial] = float("inf")
        near = max(first // self.size - self.local + 1, 0)
        block = torch.arange(near, importance.shape[-1], device=importance.device)
        own = torch.arange(first, first + importance.shape[-2], device=importance.device).unsqueeze(1) // self.size
        late = importance[..., near:]
        late.masked_fill_(block > own - self.local, float("inf")).masked_fill_(block > own, NEVER)
        return importance

    def importance(self, weights: Tensor, num_blocks: int) -> Tensor:
        """Weights (..., C) of compressed blocks, times the strides that they share with each block: (..., blocks).

        Strides are summed first over those that begin with each stride, then over those that begin in each block.
        """
        taps, ahead = self.size // self.stride, self.block // self.stride - 1
        length = num_blocks * taps
        padded = pad(weights, (ahead, length - weights.shape[-1]))
        reaching = sum_of([padded[..., shift : shift + length] for shift in range(ahead + 1)])
        return reaching.unflatten(-1, (num_blocks, taps)).sum(-1)

    @torch.no_grad()
    def last_sees(self, weights: Tensor | None, num_keys: int, groups: int) -> KeyRanges:
        """The blocks that the last query chooses, as ranges of keys for each group of heads.

        ``weights`` (B, H, C) are its heads' on the compressed blocks, ``groups`` (G) those that read the same blocks.
        """
        num_blocks = -(-num_keys // self.size)
        if weights is None or num_blocks <= self.count:
            return KeyRanges.of([((0, num_keys),)])
        of_group = weights if weights.shape[1] == groups else weights.unflatten(1, (groups, -1)).sum(2)
        judged = self._importance_of_last(of_group, num_blocks - self.local)
        count = self.count - self.initial - self.local
        return KeyRanges.of_best(judged, count, self.size, num_keys, first=self.initial, own=self.local)

    def _importance_of_last(self, weights: Tensor, end: int) -> Tensor:
        """`importance` of the blocks from ``initial`` to ``end``, in few operators: a step's cost is their number."""
        taps, ahead = self.size // self.stride, self.block // self.stride - 1
        first = self.initial * taps - ahead  # the compressed block that reaches into the first of these
        if first < 0 or end * taps > weights.shape[-1]:
            weights = pad(weights, (ahead, max(end * taps - weights.shape[-1], 0)))
            first += ahead
        shape, (*strides, _) = (*weights.shape[:-1], end - self.initial, taps + ahead), weights.stride()
        reaching = weights.as_strided(shape, (*strides, taps, 1), weights.storage_offset() + first)
        return (reaching * _shared_strides(taps, ahead + 1, weights.dtype, weights.device)).sum(-1)


@lru_cache(maxsize=8)
def _shared_strides(taps: int, strides: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """How many strides of a compressed block a block of ``taps`` strides shares, for each where one may begin."""
    counts = [sum(0 <= at - shift < taps for shift in range(strides)) for at in range(taps + strides - 1)]
    return torch.tensor(counts, dtype=dtype, device=device)


def _table(q: Tensor, compressed: Tensor, num_keys: int, settings: list[int]) -> Tensor:
    """What a selector of these settings chooses, a boolean a block, (B, G, N, K)."""
    words = BlockSelector(*settings).words(q.detach(), compressed.detach(), num_keys)
    rows = torch.arange(rows_per_word(1), device=words.device).view(-1, 1)
    return (words.unsqueeze(3) >> rows & 1).bool().flatten(2, 3)[:, :, : q.shape[2]].contiguous()


def _fake_table(q: Tensor, compressed: Tensor, num_keys: int, settings: list[int]) -> Tensor:
    num_blocks = -(-num_keys // settings[2])
    return q.new_empty(q.shape[0], compressed.shape[1], q.shape[2], num_blocks, dtype=torch.bool)


_chosen_blocks = autodiff.choice(
    "nsa_blocks(Tensor q, Tensor compressed, SymInt num_keys, int[] settings) -> Tensor", _table, _fake_table
)
