"""A dynamic pattern of blocks whose tokens are alike, judged by their means; other blocks are always seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.patterns.algebra import Pattern, Scene
from foveate.patterns.rules.choice import counted_from, looked_at
from foveate.patterns.rules.choose import NEVER, pool, score
from foveate.patterns.rules.decided import block_table, pack_rows
from foveate.patterns.rules.sequence import causal as not_after
from foveate.patterns.rules.sequence import full, positive
from foveate.precision import to_accum

ByHead = float | Sequence[float]


@dataclass(frozen=True, eq=False, repr=False)
class SimilarBlocks(Pattern):
    tau: tuple[float, ...]  # one for all heads, or one a head
    theta: tuple[float, ...]
    q_block: int
    k_block: int
    sink: bool
    causal: bool

    is_dynamic = True
    chooses_ahead = True

    @property
    def text(self) -> str:  # type: ignore[override]
        tau, theta = (repr(x[0]) if len(x) == 1 else repr(list(x)) for x in (self.tau, self.theta))
        more = ("" if self.sink else ", sink=False") + ("" if self.causal else ", causal=False")
        return f"similar_blocks({tau}, {theta}, q_block={self.q_block}, k_block={self.k_block}{more})"

    @property
    def sees_future(self) -> bool:  # type: ignore[override]
        return not self.causal

    def looking_back(self) -> Pattern:
        return replace(self, causal=True)

    @torch.no_grad()
    def resolve(self, scene: Scene) -> Pattern:
        q, k, scale = looked_at(self, scene)
        within = not_after if self.causal else full
        if not q.shape[2] or not k.shape[2]:
            return within
        lead = scene.first % self.k_block  # keys that block 0 lacks; positions count from its start here
        first = scene.offset + scene.first  # of the first query, in the text
        into = first % self.q_block
        start = scene.offset + lead - into
        competing = self._competing(q, scene, start, lead)
        taken = self._taken(q, k, scale, into, lead, competing) & competing
        words = pack_rows(taken, self.q_block)
        table = block_table(words, taken.shape[2], q_block=self.q_block, k_block=self.k_block, q_start=start)
        return counted_from(scene.first - lead, table & within if self.causal else table)

    def _competing(self, q: Tensor, scene: Scene, start: int, lead: int) -> Tensor:
        """Blocks (R, C) of which some query of a row may see some key."""
        first, end = scene.offset + lead, scene.offset + lead + q.shape[2]
        rows, blocks = -(-(end - start) // self.q_block), -(-(scene.num_keys + lead) // self.k_block)
        place = start + torch.arange(rows, device=q.device).unsqueeze(1) * self.q_block
        begin = torch.arange(blocks, device=q.device) * self.k_block
        found = torch.ones(rows, blocks, dtype=torch.bool, device=q.device)
        if self.causal:
            found &= begin <= (place + self.q_block).clamp(max=end) - 1
        if scene.reach is not None:
            found &= begin + self.k_block - 1 >= place.clamp_min(first) - scene.reach
        return found

    def _taken(self, q: Tensor, k: Tensor, scale: float, into: int, lead: int, competing: Tensor) -> Tensor:
        """Which blocks each row takes, (B, H, R, C)."""
        heads, group = q.shape[1], q.shape[1] // k.shape[1]
        tau, theta = (self._of_heads(numbers, heads, q) for numbers in (self.tau, self.theta))
        alike_q = self_similarity(q, self.q_block, into) > theta
        centred = to_accum(k) - to_accum(k).mean(2, keepdim=True)
        alike_k = self_similarity(centred, self.k_block, lead).repeat_interleave(group, 1) > theta
        scores = score(pool(q, self.q_block, lead=into), pool(k, self.k_block, lead=lead) * scale)
        scores.masked_fill_(~(competing & alike_k.unsqueeze(2)), NEVER)
        taken = most_within(torch.softmax(scores, -1).nan_to_num_(0.0), tau.unsqueeze(-1))
        taken |= ~alike_k.unsqueeze(2) | ~alike_q.unsqueeze(3)
        if self.sink:
            taken[..., 0] = True
        return taken

    def _of_heads(self, numbers: tuple[float, ...], heads: int, q: Tensor) -> Tensor:
        if len(numbers) not in (1, heads):
            raise ValueError(f"{self} takes one number for all heads or one a head; got {len(numbers)} for {heads}")
        return torch.tensor(numbers, dtype=to_accum(q[:0]).dtype, device=q.device).view(1, -1, 1)


def self_similarity(x: Tensor, block: int, lead: int = 0) -> Tensor:
    """The mean cosine of all pairs of tokens of a block, (B, H, blocks): the squared length of their mean direction.

    >>> self_similarity(torch.tensor([[[[1.0, 0], [2, 0], [1, 0], [-1, 0]]]]), 2)
    tensor([[[1., 0.]]])
    """
    return pool(normalize(to_accum(x), dim=-1), block, lead=lead).square().sum(-1)


def most_within(share: Tensor, mass: Tensor) -> Tensor:
    """True at the greatest shares of each row that together are at most ``mass``, at the greatest whatever it is.

    >>> most_within(torch.tensor([[0.2, 0.5, 0.3], [0.9, 0.1, 0.0]]), torch.tensor(0.85))
    tensor([[False,  True,  True],
            [ True, False, False]])
    """
    ordered, order = share.sort(dim=-1, descending=True, stable=True)
    kept = (ordered.cumsum(-1) <= mass) | (mass >= 1)
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def similar_blocks(
    tau: ByHead = 0.98,
    theta: ByHead = 0.6,
    *,
    q_block: int = 128,
    k_block: int = 64,
    sink: bool = True,
    causal: bool = True,
) -> Pattern:
    """Blocks of keys that hold at most ``tau`` of mean queries' softmax over mean keys, where their tokens are alike.

    A block is judged by its mean where the mean cosine of its tokens is above ``theta`` (of keys less the mean key);
    blocks of keys that are not alike are seen by all, and blocks of queries that are not see all. The best block of a
    row is taken even if it holds more than ``tau``. ``sink`` lets every query see the first block. Both numbers are one
    for all heads or one a head; ``tau=1`` is everything.

    Zhang et al., SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference, arXiv 2502.18137, and the
    authors' code where that has more: the mean key, the best block, and the first.

    >>> q, k = torch.ones(1, 1, 6, 1), torch.tensor([0.0, 0, 9, 9, 1, 2]).view(1, 1, 6, 1)
    >>> similar_blocks(0.9, 0.0, q_block=2, k_block=2, sink=False).select(q, k, tile=8).to_dense()[0, 0].int()
    tensor([[1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0],
            [0, 0, 1, 1, 0, 0],
            [0, 0, 1, 1, 0, 0],
            [0, 0, 1, 1, 0, 0]], dtype=torch.int32)

    Raises ValueError unless 0 < tau <= 1, -1 <= theta <= 1 and blocks have at least one token.
    """
    taus, thetas = _numbers(tau), _numbers(theta)
    if any(not 0 < one <= 1 for one in taus) or any(not -1 <= one <= 1 for one in thetas):
        raise ValueError(f"similar_blocks takes 0 < tau <= 1 and -1 <= theta <= 1; got {tau!r} and {theta!r}")
    rows, blocks = (
        positive("similar_blocks", name, size) for name, size in (("q_block", q_block), ("k_block", k_block))
    )
    return SimilarBlocks(taus, thetas, rows, blocks, bool(sink), bool(causal))


def _numbers(given: ByHead) -> tuple[float, ...]:
    numbers = (given,) if isinstance(given, int | float) else tuple(given)
    if not numbers or any(isinstance(x, bool) or not isinstance(x, int | float) or math.isnan(x) for x in numbers):
        raise ValueError(f"a number for all heads or one a head was expected; got {given!r}")
    return tuple(float(x) for x in numbers)
