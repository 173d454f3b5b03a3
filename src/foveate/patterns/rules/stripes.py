"""Dynamic patterns of whole columns: keys that all queries of a head, or of a group of blocks, see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.patterns.algebra import Pattern, Scene
from foveate.patterns.rules.choice import PromptChoice, counted_from
from foveate.patterns.rules.choose import NEVER, fewest, pool, score, slices
from foveate.patterns.rules.decided import Columns, block_table, pack_rows
from foveate.patterns.rules.sequence import blocks, positive, sinks, window


@dataclass(frozen=True, eq=False, repr=False)
class SampledColumns(PromptChoice):
    mass: float
    rows: float
    width: float

    @property
    def sees_all(self) -> bool:  # type: ignore[override]
        return self.mass >= 1

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"sampled_columns({self.mass}, rows={self.rows}, width={self.width})"

    def chosen(self, q: Tensor, keys: Tensor, scene: Scene) -> Pattern:
        width = max(round(self.width * scene.num_keys), 1)
        near = window(width - 1, 0) if width > 1 else blocks(1)
        sampled = torch.arange(q.shape[2] - 1, -1, -max(round(1 / self.rows), 1), device=q.device).flip(0)
        total = column_mass(q[:, :, sampled], keys, sampled + scene.offset, scene.reach)
        share = total / total.sum(-1, keepdim=True).clamp_min(torch.finfo(total.dtype).tiny)
        return counted_from(scene.first, Columns.of(fewest(share, self.mass))) | near


def column_mass(q: Tensor, keys: Tensor, position: Tensor, reach: int | None = None) -> Tensor:
    """Causal softmax weights of queries (B, H, n, D) at positions (n,), summed by key: (B, H, M)."""
    batch, heads, count, _ = q.shape
    total = keys.new_zeros(batch, heads, keys.shape[2])
    key = torch.arange(keys.shape[2], device=q.device)
    for part in slices(count, batch * heads * keys.shape[2]):
        own = position[part].unsqueeze(1)
        hidden = key > own
        if reach is not None:
            hidden |= key < own - reach
        total += score(q[:, :, part], keys).masked_fill_(hidden, NEVER).softmax(-1).sum(2)
    return total


def sampled_columns(mass: float, *, rows: float = 0.05, width: float = 0.08) -> Pattern:
    """A window of recent keys, and the fewest keys to which a sample of the queries gives ``mass`` of its weights.

    Every ``1 / rows``-th query, counted back from the last, attends exactly; its weights are summed by key. The window
    is ``width`` of the text. Each head chooses once for the whole input; ``mass=1`` is everything.

    Zhu et al., SampleAttention: Near-Lossless Acceleration of Long Context LLM Inference with Adaptive Structured
    Sparse Attention, arXiv 2406.15486.

    >>> from foveate import causal
    >>> q, k = torch.ones(1, 1, 5, 1), torch.tensor([0.0, 9, 0, 0, 0]).view(1, 1, 5, 1)
    >>> sampled_columns(0.9, width=0.2).select(q, k, tile=8).to_dense()[0, 0].int()
    tensor([[1, 0, 0, 0, 0],
            [0, 1, 0, 0, 0],
            [0, 1, 1, 0, 0],
            [0, 1, 0, 1, 0],
            [0, 1, 0, 0, 1]], dtype=torch.int32)

    Raises ValueError unless mass, rows and width are in (0, 1].
    """
    for name, value in (("mass", mass), ("rows", rows), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(f"sampled_columns takes {name} above 0 and at most 1; got {value!r}")
    return SampledColumns(mass, rows, width)


@dataclass(frozen=True, eq=False, repr=False)
class Stripes(PromptChoice):
    theta: float
    block: int
    step: int

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"stripes({self.theta}, block={self.block}, step={self.step})"

    def chosen(self, q: Tensor, keys: Tensor, scene: Scene) -> Pattern:
        group = self.block * self.step
        offset = scene.offset + scene.first  # of the first query
        start = offset // group * group  # groups are counted from the text's first token
        anchors = self._anchors(q, keys, scene)
        lead = offset % self.block
        pooled, mean = pool(q, self.block, lead=lead), pool(anchors.unsqueeze(-1), self.block, lead=lead).squeeze(-1)
        missing = offset // self.block - start // self.block  # rows of the first group that come before the queries
        kept = []
        for first in range(-missing, pooled.shape[2], self.step):
            own = slice(max(first, 0), first + self.step)
            near_enough = score(pooled[:, :, own], keys) + self.theta >= mean[:, :, own].unsqueeze(-1)
            kept.append(near_enough.any(2))
        words = pack_rows(torch.stack(kept, 2), group)
        table = block_table(words, len(kept), q_block=group, k_block=1, q_start=start - scene.first)
        return counted_from(scene.first, table) | sinks(self.block) | blocks(group)

    def _anchors(self, q: Tensor, keys: Tensor, scene: Scene) -> Tensor:
        """The greatest score (B, H, N) of each query among the first block of keys and those of its own group."""
        group, first = self.block * self.step, scene.first
        position = torch.arange(q.shape[2], device=q.device) + scene.offset + first
        key = torch.arange(keys.shape[2], device=q.device) + first
        found = []
        for number in range(int(position[0]) // group, int(position[-1]) // group + 1):
            rows = slice(max(number * group - int(position[0]), 0), (number + 1) * group - int(position[0]))
            at = position[rows].unsqueeze(1)
            common = (key < self.block) | ((key >= number * group) & (key < (number + 1) * group))
            few = common.nonzero().squeeze(1)
            hidden = key[few] > at
            if scene.reach is not None:
                hidden |= key[few] < at - scene.reach
            found.append(score(q[:, :, rows], keys[:, :, few]).masked_fill_(hidden, NEVER).amax(-1))
        return torch.cat(found, 2)


def stripes(theta: float = 12.0, *, block: int = 128, step: int = 16) -> Pattern:
    """The first block, the query's own group of blocks, and single keys that come near the greatest score in these.

    Queries go by blocks of ``block``, and these by groups of ``step``. A query's anchor is its greatest score among the
    first block and its own group up to itself. A key is seen by a whole group if for one of its blocks the mean query's
    score with it is less than ``theta`` below the block's mean anchor. Scores are logits.

    Zhang et al., AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity, arXiv 2505.23520.

    >>> q, k = torch.ones(1, 1, 6, 1), torch.tensor([0.0, 9, 0, 0, 0, 5]).view(1, 1, 6, 1)
    >>> stripes(2.0, block=1, step=2).select(q, k, tile=8).to_dense()[0, 0].int()
    tensor([[1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 1, 0],
            [1, 1, 1, 1, 1, 1]], dtype=torch.int32)

    Raises ValueError for a theta below 0, or a block or step below 1.
    """
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta >= 0:
        raise ValueError(f"stripes takes a difference theta of at least 0; got {theta!r}")
    return Stripes(float(theta), positive("stripes", "block", block), positive("stripes", "step", step))
