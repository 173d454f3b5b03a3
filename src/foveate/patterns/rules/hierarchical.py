"""A dynamic pattern that finds each block of queries its best keys by halving ranges of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.patterns.algebra import Pattern, Scene
from foveate.patterns.rules.choice import PromptChoice, counted_from
from foveate.patterns.rules.choose import NEVER, slices
from foveate.patterns.rules.decided import block_table, pack_rows
from foveate.patterns.rules.sequence import positive


@dataclass(frozen=True, eq=False, repr=False)
class HalvedRanges(PromptChoice):
    keys: int
    q_block: int
    k_block: int

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"halved_ranges({self.keys}, q_block={self.q_block}, k_block={self.k_block})"

    @property
    def chooses_ahead(self) -> bool:  # type: ignore[override]
        return self.q_block > 1

    def chosen(self, q: Tensor, keys: Tensor, scene: Scene) -> Pattern:
        lead = scene.first % self.k_block  # positions count from the start of the first key's block here
        offset = scene.offset + lead
        start = offset // self.q_block * self.q_block
        rows, place = (
            in_rows(q, self.q_block, offset - start),
            torch.arange(start, offset + q.shape[2], self.q_block, device=q.device),
        )
        ends = (place + self.q_block).clamp(max=offset + q.shape[2]).to(q.device)  # behind the last query of each row
        blocks = -(-ends // self.k_block)
        count = min(-(-self.keys // self.k_block), int(blocks[-1]))  # more ranges than blocks would be empty
        nearest = (
            None if scene.reach is None else ((place.clamp_min(offset) - scene.reach).clamp_min(0) // self.k_block)
        )
        table = torch.zeros(*q.shape[:2], len(place), int(blocks[-1]) + 1, dtype=torch.bool, device=q.device)
        for part in slices(len(place), 4 * q.shape[0] * q.shape[1] * self.q_block * min(count, int(blocks[-1]))):
            first = torch.zeros_like(blocks[part]) if nearest is None else nearest[part]
            found = self._search(rows[:, :, part], keys, first, blocks[part], ends[part] - 1 - lead, lead, count)
            table[:, :, part].scatter_(3, found.where(found >= 0, table.shape[3] - 1), True)
        words = block_table(
            pack_rows(table[..., :-1], self.q_block),
            len(place),
            q_block=self.q_block,
            k_block=self.k_block,
            q_start=start,
        )
        return counted_from(scene.first - lead, words)

    def _search(
        self, rows: Tensor, keys: Tensor, first: Tensor, end: Tensor, last: Tensor, lead: int, count: int
    ) -> Tensor:
        """Blocks (B, H, R, K) of each row of queries (B, H, R, q_block, D), -1 for none, out of those to ``end`` (R,).

        ``last`` (R,) is the key slot of each row's last query.
        """
        begin, stop = divided(first, end, count)
        begin, stop = (x.expand(*rows.shape[:2], *x.shape).contiguous() for x in (begin, stop))
        while bool((stop - begin > 1).any()):
            middle = (begin + stop + 1) // 2
            begin, stop = torch.cat([begin, middle], 3), torch.cat([middle, stop], 3)
            at = ((begin + stop) * self.k_block // 2 - lead).clamp_min(0)
            scores = self._scores(rows, keys, torch.minimum(at, last.unsqueeze(1)))
            scores.masked_fill_(begin >= stop, NEVER)
            kept = scores.sort(dim=3, descending=True, stable=True).indices[..., :count]
            begin, stop = begin.gather(3, kept), stop.gather(3, kept)
        return torch.where(begin < stop, begin, -1)

    def _scores(self, rows: Tensor, keys: Tensor, at: Tensor) -> Tensor:
        """The greatest score that a query of each row gives to keys at slots (B, H, R, K): (B, H, R, K)."""
        group = rows.shape[1] // keys.shape[1]
        batch, heads, count, ranges = at.shape
        flat = at.unflatten(1, (-1, group)).flatten(2).unsqueeze(-1).expand(-1, -1, -1, keys.shape[3])
        chosen = keys.gather(2, flat).view(batch, heads, count, ranges, -1)
        return (rows.to(keys.dtype) @ chosen.mT).amax(3)


def in_rows(q: Tensor, block: int, lead: int) -> Tensor:
    """Queries (B, H, N, D) as (B, H, R, block, D); places before the first and behind the last repeat these."""
    at = torch.arange(-lead, q.shape[2] + (-lead - q.shape[2]) % block, device=q.device)
    return q[:, :, at.clamp(0, q.shape[2] - 1)].unflatten(2, (-1, block))


def divided(first: Tensor, end: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The blocks from ``first`` to ``end`` (R,) in ``count`` ranges as equal as can be: begins and ends (R, count).

    >>> divided(torch.tensor([0]), torch.tensor([7]), 3)
    (tensor([[0, 2, 4]]), tensor([[2, 4, 7]]))
    """
    edges = torch.arange(count + 1, device=first.device)
    cuts = first.unsqueeze(1) + (end - first).unsqueeze(1) * edges // count
    return cuts[:, :-1], cuts[:, 1:]


def halved_ranges(keys: int, *, q_block: int = 64, k_block: int = 16) -> Pattern:
    """The blocks of keys, ``keys`` keys in all, that a search by halves finds best for each block of queries.

    The keys up to the last query of a row of ``q_block`` are divided into ranges, as many as blocks of ``k_block`` are
    sought. Every range is halved, each half is judged by the greatest score of a query of the row with the key in the
    half's middle, the best are kept, and so on until they are single blocks: O(log M) steps, whatever the keys. No key
    after a query is seen.

    Lee et al., A Training-free Sub-quadratic Cost Transformer Model Serving Framework With Hierarchically Pruned
    Attention, arXiv 2406.09827.

    >>> q, k = torch.ones(1, 1, 6, 1), torch.tensor([0.0, 0, 5, 5, 0, 0]).view(1, 1, 6, 1)
    >>> halved_ranges(2, q_block=1, k_block=1).select(q, k, tile=8).to_dense()[0, 0].int()
    tensor([[1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 0, 1, 0, 0, 0],
            [0, 0, 1, 1, 0, 0],
            [0, 0, 1, 1, 0, 0],
            [1, 0, 1, 0, 0, 0]], dtype=torch.int32)

    Raises ValueError unless all three are at least 1.
    """
    sizes = {"keys": keys, "q_block": q_block, "k_block": k_block}
    return HalvedRanges(*(positive("halved_ranges", name, size) for name, size in sizes.items()))
