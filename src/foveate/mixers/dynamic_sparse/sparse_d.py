"""SparseD: blocks of keys chosen once from exact attention, and attended to in all later steps of denoising."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Unpack

import torch
from torch import Tensor

from foveate.attention import attend
from foveate.layouts.place import NOWHERE
from foveate.mixers.core import CoreOptions, joined
from foveate.patterns import Layout, Pattern, Scene, Sequence, block_mask, full
from foveate.patterns.algebra import resolve
from foveate.patterns.placed import split
from foveate.patterns.rules.choose import NEVER, best, score
from foveate.patterns.select.dense import rows_of_mask
from foveate.precision import to_accum


@dataclass
class Clock:
    """Which step of denoising it is, for all layers of a model; the first is 0."""

    step: int = 0


@dataclass(eq=False)
class SparseDCore:
    """Plain attention in the first steps; the last of them records which blocks each head needs, later ones see these.

    Of ``steps`` steps the first ``skip`` are exact: numbers 0 to ⌊skip steps⌋ + 1, as the authors' code counts. The
    last of these sums each block's softmax weights and keeps the ⌊select C⌋ + 1 greatest of the C blocks of ``block``
    keys of each head and each ``block`` of queries. The ``generated`` last tokens choose apart from the prompt: of the
    blocks before the first that holds nothing else (the last one always is one), those are kept that are among the best
    of all; of these C' blocks, the ⌊select C'⌋ + 1 best by a softmax over their keys alone. Choices are by scaled
    products, within what the model lets a query see. A core is of one layer; ``clock`` says which step it is.

    >>> core = SparseDCore(steps=10, block=8)
    >>> q, k, v = torch.randn(3, 1, 2, 50, 4).unbind(0)
    >>> for core.clock.step in range(10):
    ...     out = core(q, k, v)
    >>> core.exact_steps, core.table.shape
    (4, torch.Size([1, 2, 7, 7]))

    Raises ValueError in a later step if no blocks were recorded, or for another text than was recorded.
    """

    steps: int
    skip: float = 0.2
    select: float = 0.3
    block: int = 128
    generated: int = 0
    clock: Clock = field(default_factory=Clock)
    table: Tensor | None = None  # (B, H, R, C)
    length: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.block < 1 or self.generated < 0:
            raise ValueError(
                "steps and block are at least 1, generated at least 0;"
                f" got {self.steps}, {self.block} and {self.generated}"
            )
        if not 0 <= self.skip <= 1 or not 0 <= self.select <= 1:
            raise ValueError(f"skip and select are shares, from 0 to 1; got {self.skip} and {self.select}")

    @property
    def pattern(self) -> Pattern:
        """Everything: what is seen later, earlier steps decide."""
        return full

    @property
    def exact_steps(self) -> int:
        """How many steps attend to everything."""
        return int(self.steps * self.skip) + 2

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, within: Pattern = full, **options: Unpack[CoreOptions]
    ) -> Tensor:
        if self.clock.step < self.exact_steps:
            if self.clock.step == self.exact_steps - 1:
                layout = options.get("layout") or Sequence()
                self.table, self.length = self.recorded(q, k, within, options.get("scale"), layout), k.shape[2]
            return attend(q, k, v, within, **options)
        if self.table is None:
            raise ValueError(
                f"no blocks were recorded: run step {self.exact_steps - 1} before step {self.clock.step}, on this text"
            )
        if (len(self.table), self.length, self.length) != (len(q), q.shape[2], k.shape[2]):
            raise ValueError(
                f"blocks were recorded for {len(self.table)} texts of {self.length} tokens; got {len(q)} of"
                f" {q.shape[2]} queries and {k.shape[2]} keys: restart() begins with another"
            )
        return attend(q, k, v, joined(block_mask(self.table, self.block), within), **options)

    @torch.no_grad()
    def recorded(self, q: Tensor, k: Tensor, within: Pattern, scale: float | None, layout: Layout) -> Tensor:
        """The blocks of keys that each head needs for each block of queries, (B, H, R, C); padding has no say."""
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"a text is denoised as a whole, without a cache; got {q.shape[2]} queries and {k.shape[2]} keys"
            )
        keys = to_accum(k) * (q.shape[3] ** -0.5 if scale is None else scale)
        scene = Scene(q.shape[2], k.shape[2], layout, q.detach(), k.detach(), scale)
        allowed = resolve(within, scene)
        place = split(within, layout, k.shape[2])[1]
        real = q.new_ones(1, q.shape[2], dtype=torch.bool) if place is None else place.document != NOWHERE
        starts = range(0, q.shape[2], self.block)
        last = next((c for c, start in enumerate(starts) if k.shape[2] - start <= self.generated), len(starts) - 1)
        rows = []
        for start in starts:
            numbers = torch.arange(start, min(start + self.block, q.shape[2]), device=q.device)
            seen = rows_of_mask(allowed, scene, numbers, q.shape[1]) & real[:, None, numbers, None]
            rows.append(self._row(score(q[:, :, numbers], keys).masked_fill_(~seen, NEVER), last))
        return torch.stack(rows, 2) if rows else q.new_zeros(*q.shape[:2], 0, 0, dtype=torch.bool)

    def _row(self, scores: Tensor, last: int) -> Tensor:
        """Those of one block of queries with scores (B, H, n, M), (B, H, C)."""
        kept = self._best(scores)
        kept[..., last:] = self._best(scores[..., last * self.block :])
        return kept

    def _best(self, scores: Tensor) -> Tensor:
        """The blocks of the greatest sums of weights, of scores (B, H, n, M)."""
        weights = scores.softmax(-1).nan_to_num_(0.0).sum(2)
        missing = -weights.shape[-1] % self.block
        blocks = torch.nn.functional.pad(weights, (0, missing)).unflatten(-1, (-1, self.block)).sum(-1)
        return best(blocks, int(blocks.shape[-1] * self.select) + 1)
