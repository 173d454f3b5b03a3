"""Dynamic patterns: each query's keys are chosen by looking at q and k.

Choosing never holds all pairs of queries and keys: blocks stand in for their keys, or queries go a few at a
time. No gradient flows through a choice. What a choice is joined with by ``&`` narrows it: padding (``key_padding``)
and other documents never compete, nor does what a window, or ``causal``, hides from the query.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from foveate.patterns.algebra import Pattern, Scene
from foveate.patterns.rules.choice import PromptChoice, counted_from, looked_at
from foveate.patterns.rules.choose import (
    NEVER,
    Sought,
    before,
    best,
    choose_rows,
    looked_back,
    pool,
    score,
    shares,
    slices,
)
from foveate.patterns.rules.decided import Columns, Distances, block_table, joined, no_rows, pick, words_of
from foveate.patterns.rules.sequence import causal as not_after
from foveate.patterns.rules.sequence import is_count, positive
from foveate.precision import to_accum

Per = Literal["query", "block"]


@dataclass(frozen=True, eq=False, repr=False)
class BlockChoice(Pattern):
    """Base of patterns that choose whole blocks of keys for each query, or for each block of queries."""

    block: int
    budget: float
    per: str
    shared: bool
    causal: bool

    is_dynamic = True
    by_share = False  # chooses by softmax shares in place of scores

    @property
    def text(self) -> str:  # type: ignore[override]
        per = "" if self.per == "query" else f', per="{self.per}"'
        shared = ", shared=True" if self.shared else ""
        return f"{self._call()}{per}{shared}{_unless_causal(self.causal)})"

    @property
    def sees_future(self) -> bool:  # type: ignore[override]
        return not self.causal

    @property
    def chooses_ahead(self) -> bool:  # type: ignore[override]
        return self.per == "block" or not self.causal

    @property
    def counts_queries(self) -> bool:  # type: ignore[override]
        return self.causal or self.per == "block"

    def looking_back(self) -> Pattern:
        return replace(self, causal=True)

    def _call(self) -> str:
        raise NotImplementedError

    @property
    def sought(self) -> Sought:
        raise NotImplementedError

    @torch.no_grad()
    def resolve(self, scene: Scene) -> Pattern:
        q, k, scale = looked_at(self, scene)
        q_block = self.block if self.per == "block" else 1
        lead = scene.first % self.block  # keys that block 0 lacks; positions count from its start here
        offset = scene.offset + lead
        start = offset // q_block * q_block  # position of the first query of row 0
        rows = q if q_block == 1 else pool(q, q_block, lead=offset - start)
        keys = pool(k, self.block, lead=lead) * scale  # (B, G, K, D)
        words = self._words(rows, keys, start, q_block, scene.reach)
        table = block_table(words, rows.shape[2], q_block=q_block, k_block=self.block, q_start=start)
        return counted_from(scene.first - lead, table & not_after if self.causal else table)

    def _words(self, rows: Tensor, keys: Tensor, start: int, q_block: int, reach: int | None) -> Tensor:
        """The choices of rows of ``q_block`` queries, packed; a causal row is scored only as far as it may see."""
        batch, heads, num_rows, _ = rows.shape
        shape = (batch, keys.shape[1] if self.shared else heads, num_rows, keys.shape[2])
        words = no_rows(*shape, q_block=q_block, device=rows.device)
        for part in slices(num_rows, batch * heads * keys.shape[2]):
            place = start + torch.arange(part.start, part.stop, device=rows.device) * q_block
            own = self._own(place)
            within = keys if own is None else keys[:, :, : max(int(own[-1:].sum()) + 1, 0)]
            scores = score(rows[:, :, part], within)
            if reach is not None:  # blocks compete that all queries of the row see whole
                begin = torch.arange(scores.shape[3], device=rows.device) * self.block
                scores.masked_fill_(begin < (place + q_block - 1 - reach).unsqueeze(1), NEVER)
            weights = self.weighed(scores, keys.shape[1], own)
            choose_rows(weights, self.sought, words_of(words, part, q_block), q_block, own=own)
        return words

    def _own(self, place: Tensor) -> Tensor | None:
        """The block that a query at each place surely sees, where only those before it compete."""
        return place // self.block if self.causal else None

    def weighed(self, scores: Tensor, groups: int, own: Tensor | None) -> Tensor:
        """What to choose by: scores or shares of each head, or mean shares of each group of heads."""
        if not (self.by_share or self.shared):
            return scores
        found = shares(scores if own is None else before(own, scores))
        return found.unflatten(1, (groups, -1)).mean(2) if self.shared else found


class TopBlocks(BlockChoice):
    def _call(self) -> str:
        return f"topk_blocks({self.block}, k={self.budget}"

    @property
    def sought(self) -> Sought:
        return Sought(self.budget - self.causal)  # the own block is one of the k


class MassBlocks(BlockChoice):
    by_share = True

    def _call(self) -> str:
        return f"mass_blocks({self.block}, {self.budget}"

    @property
    def sought(self) -> Sought:
        return Sought(self.budget, by_share=True)


def topk_blocks(block: int, k: int, *, per: Per = "query", shared: bool = False, causal: bool = True) -> Pattern:
    """The k blocks of ``block`` keys whose mean key scores best, chosen by each query for itself.

    With ``causal`` the query's own block is always one of the k, only blocks wholly before it compete for the
    others, and no key after the query is seen; otherwise all compete. ``per="block"`` lets the mean query
    of each block choose for all of it, so a choice depends on later queries of the block.
    ``shared=True`` lets the query heads of a group with common keys choose together, by mean softmax share.

    Lu et al., MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv 2502.13189; ``per="block"`` is
    the block-sparse head of Jiang et al., MInference 1.0, arXiv 2407.02490.

    >>> q = k = torch.eye(6)[None, None]
    >>> topk_blocks(2, k=2).select(q, k, tile=8).to_dense()[0, 0].int()
    tensor([[1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 0],
            [1, 1, 0, 0, 1, 1]], dtype=torch.int32)

    Raises ValueError unless ``block`` and ``k`` are at least 1 and ``per`` is "query" or "block".
    """
    block, k = positive("topk_blocks", "block", block), positive("topk_blocks", "k", k)
    return TopBlocks(block, k, _per("topk_blocks", per), bool(shared), bool(causal))


def mass_blocks(block: int, mass: float, *, per: Per = "query", shared: bool = False, causal: bool = True) -> Pattern:
    """The fewest blocks of ``block`` keys whose softmax shares, by their mean keys, add up to ``mass``.

    With ``causal`` the shares are those of the blocks that lie wholly before the query's own block, which is
    always seen (up to the query) and counts for nothing; otherwise those of all blocks. ``mass=1`` is
    everything. ``per`` and ``shared`` are those of :func:`topk_blocks`.

    Lai et al., FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference,
    arXiv 2502.20766.

    >>> q, k = torch.ones(1, 1, 6, 1), torch.tensor([9.0, 9, 0, 0, 0, 0]).view(1, 1, 6, 1)
    >>> mass_blocks(2, 0.9).select(q, k, tile=8).to_dense()[0, 0].int()
    tensor([[1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 0],
            [1, 1, 0, 0, 1, 1]], dtype=torch.int32)

    Raises ValueError unless ``block`` is at least 1, 0 < ``mass`` <= 1, and ``per`` is "query" or "block".
    """
    if isinstance(mass, bool) or not isinstance(mass, (int, float)) or not 0 < mass <= 1:
        raise ValueError(f"mass_blocks takes a mass above 0 and at most 1; got {mass!r}")
    block = positive("mass_blocks", "block", block)
    return MassBlocks(block, mass, _per("mass_blocks", per), bool(shared), bool(causal))


@dataclass(frozen=True, eq=False, repr=False)
class VerticalSlash(PromptChoice):
    vertical: int
    slash: int
    last: int
    first: int = 0
    near: int = 1

    @property
    def text(self) -> str:  # type: ignore[override]
        usual = (("last", 64), ("first", 0), ("near", 1))
        more = "".join(f", {name}={getattr(self, name)}" for name, value in usual if getattr(self, name) != value)
        return f"vertical_slash({self.vertical}, {self.slash}{more})"

    def chosen(self, q: Tensor, keys: Tensor, scene: Scene) -> Pattern:
        last = min(self.last, q.shape[2], keys.shape[2])
        by_key, by_distance = looked_back(to_accum(q[:, :, q.shape[2] - last :]), keys, scene.reach)
        by_key[..., : self.first] = float("inf")
        by_distance[..., : self.near] = float("inf")  # every query sees itself
        lines = Columns.of(best(by_key, self.vertical)) | Distances.of(best(by_distance, self.slash))
        return counted_from(scene.first, lines)


def vertical_slash(vertical: int, slash: int, *, last: int = 64, first: int = 0, near: int = 1) -> Pattern:
    """The ``vertical`` keys and ``slash`` distances the ``last`` queries attend to most, for every query.

    Each head chooses once for the whole input, so early queries follow what late ones need; no key after a
    query is ever seen. The ``first`` keys are always among the keys, the ``near`` least distances among the distances;
    the authors' code has 30 of both.

    Jiang et al., MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention,
    arXiv 2407.02490.

    >>> q, k = torch.ones(1, 1, 5, 1), torch.tensor([0.0, 9, 0, 0, 0]).view(1, 1, 5, 1)
    >>> vertical_slash(1, 1).select(q, k, tile=8).to_dense()[0, 0].int()
    tensor([[1, 0, 0, 0, 0],
            [0, 1, 0, 0, 0],
            [0, 1, 1, 0, 0],
            [0, 1, 0, 1, 0],
            [0, 1, 0, 0, 1]], dtype=torch.int32)

    Raises ValueError unless ``vertical``, ``slash``, ``last`` and ``near`` are at least 1, ``first`` at least 0, and
    unless ``first`` is at most ``vertical`` and ``near`` at most ``slash``.
    """
    counts = {"vertical": vertical, "slash": slash, "last": last, "near": near}
    for name, count in counts.items():
        positive("vertical_slash", name, count)
    if not is_count(first) or first > vertical or near > slash:
        raise ValueError(
            "vertical_slash takes first from 0 to vertical, and near from 1 to slash;"
            f" got first={first!r} of {vertical}, near={near} of {slash}"
        )
    return VerticalSlash(vertical, slash, last, first, near)


@dataclass(frozen=True, eq=False, repr=False)
class TopKeys(Pattern):
    count: int
    causal: bool

    is_dynamic = True

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"topk_keys({self.count}{_unless_causal(self.causal)})"

    @property
    def sees_future(self) -> bool:  # type: ignore[override]
        return not self.causal

    @property
    def chooses_ahead(self) -> bool:  # type: ignore[override]
        return not self.causal

    @property
    def counts_queries(self) -> bool:  # type: ignore[override]
        return self.causal

    def looking_back(self) -> Pattern:
        return replace(self, causal=True)

    @torch.no_grad()
    def resolve(self, scene: Scene) -> Pattern:
        q, k, scale = looked_at(self, scene)
        keys, (batch, heads, num_queries, _) = to_accum(k) * scale, q.shape
        key = torch.arange(scene.num_keys, device=q.device)
        picks = []
        for part in slices(num_queries, batch * heads * scene.num_keys):
            scores = score(q[:, :, part], keys)
            if self.causal:
                place = scene.offset + torch.arange(part.start, part.stop, device=q.device)
                scores.masked_fill_(key > place.unsqueeze(1), NEVER)
            if scene.reach is not None:
                place = scene.offset + torch.arange(part.start, part.stop, device=q.device)
                scores.masked_fill_(key < place.unsqueeze(1) - scene.reach, NEVER)
            picks.append(pick(best(scores, self.count), part.start))
        chosen = joined(picks, num_queries, q_start=scene.offset)
        return counted_from(scene.first, chosen & not_after if self.causal else chosen)


def topk_keys(count: int, *, causal: bool = True) -> Pattern:
    """The ``count`` keys with the greatest scores, for each query; with ``causal`` none after it.

    All scores are computed, a few queries at a time, so choosing costs more time than dense attention: it is the
    yardstick for cheaper choices.

    Gupta et al., Memory-efficient Transformers via Top-k Attention, arXiv 2106.06899.

    >>> q, k = torch.ones(1, 1, 4, 1), torch.tensor([3.0, 1, 2, 4]).view(1, 1, 4, 1)
    >>> topk_keys(2).select(q, k, tile=8).to_dense()[0, 0].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 0, 1, 0],
            [1, 0, 0, 1]], dtype=torch.int32)

    Raises ValueError unless ``count`` is at least 1.
    """
    return TopKeys(positive("topk_keys", "count", count), bool(causal))


def _per(pattern: str, per: str) -> str:
    if per not in ("query", "block"):
        raise ValueError(f'{pattern} chooses per="query" or per="block"; got {per!r}')
    return per


def _unless_causal(causal: bool) -> str:
    return "" if causal else ", causal=False"
