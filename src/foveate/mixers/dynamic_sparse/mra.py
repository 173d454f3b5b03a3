"""MRA-2: attention at two resolutions, fine where blocks matter and one number a block elsewhere."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.attention import attend, attend_partial, merge
from foveate.attention.partial import Partial
from foveate.catalogue.registry import register
from foveate.mixers.attention import JUMPS, AttentionMixer
from foveate.patterns import Layout, Pattern, block_mask
from foveate.patterns.rules.choose import score
from foveate.precision import to_accum

SURELY = 5e3  # added to the score of blocks that are surely fine


@register(
    "mra",
    papers=("MRA attention (MRA-2 / MRA-2-s)",),
    formula="o_i = Σ_j w_ij v_j / Σ_j w_ij, w_ij = e^{q_i·k_j/√d} in the m best blocks, else e^{q̄_I·k̄_J/√d}",
    supports={"noncausal", "padding", "packed", "gqa"},
)
class MRA(AttentionMixer):
    """Softmax attention to the keys of the best blocks, and to the mean of each other block of keys. O(n²/b² + m b²).

    Queries and keys are averaged over blocks of ``block``; the product of a pair of means scores that pair of blocks.
    The ``per_row`` n / b pairs of the greatest scores, each less the greatest of its row, are computed token by token;
    in all others the product of means stands for every pair (MRA-2), or nothing (``sparse``: MRA-2-s). The first
    ``first`` rows and columns of blocks and ``diagonal`` diagonals are always among the fine ones. As in the authors'
    code; of equal scores exactly as many are taken as the budget says. A text may end in a shorter block.
    """

    one_by_one: ClassVar[bool] = True
    tiny: ClassVar[dict[str, Any]] = {"block": 4, "per_row": 2}
    full_budget: ClassVar[dict[str, Any] | None] = {"per_row": 1 << 20}
    exempt: ClassVar[dict[str, str]] = JUMPS

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        block: int = 32,
        per_row: int = 4,
        sparse: bool = False,
        first: int = 0,
        diagonal: int = 0,
        causal: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, causal=causal, **options)
        if block < 1 or per_row < 1 or first < 0 or diagonal < 0:
            raise ValueError(
                "block and per_row are at least 1, first and diagonal at least 0;"
                f" got {block}, {per_row}, {first} and {diagonal}"
            )
        self.block, self.per_row, self.sparse, self.first, self.diagonal = block, per_row, sparse, first, diagonal

    def attend(self, q: Tensor, k: Tensor, v: Tensor, within: Pattern, layout: Layout | None) -> Tensor:
        if not q.numel():
            return attend(q, k, v)
        coarse_q, coarse_k, coarse_v = (block_means(x, self.block) for x in (q, k, v))
        best = self.best(coarse_q.detach(), coarse_k.detach())
        fine = attend_partial(q, k, v, block_mask(best, self.block))
        if self.sparse:
            return fine.out
        others = block_mask(~best, 1)
        count = block_sizes(k.shape[2], self.block, k.device).to(to_accum(k).dtype)
        coarse = attend_partial(coarse_q, coarse_k, coarse_v, others, bias=count.log().view(1, 1, 1, -1))
        assert coarse.lse is not None
        out, lse = (x.repeat_interleave(self.block, 2)[:, :, : q.shape[2]] for x in (coarse.out, coarse.lse))
        return merge([fine, Partial(out, lse)]).out

    @torch.no_grad()
    def best(self, coarse_q: Tensor, coarse_k: Tensor) -> Tensor:
        """The pairs of blocks to compute token by token, booleans (B, H, n / b, n / b)."""
        scores = score(to_accum(coarse_q), to_accum(coarse_k)) * coarse_q.shape[3] ** -0.5
        scores -= scores.amax(-1, keepdim=True)
        place = torch.arange(scores.shape[2], device=scores.device)
        apart = (place.unsqueeze(1) - place).abs()
        sure = (apart <= self.diagonal // 2) & (self.diagonal > 0)
        early = (place < self.first).to(scores)
        scores = scores + SURELY * (sure.to(scores) + early + early.unsqueeze(1))
        budget = min(self.per_row * scores.shape[2], scores.shape[2] ** 2)
        chosen = scores.flatten(2).topk(budget, dim=2).indices
        return torch.zeros_like(scores, dtype=torch.bool).flatten(2).scatter_(2, chosen, True).view_as(scores)


def block_means(x: Tensor, block: int) -> Tensor:
    """Means of blocks of tokens, the last of which may lack some: (B, H, N, D) to (B, H, N / block, D), rounded up.

    >>> block_means(torch.tensor([1.0, 3, 7]).view(1, 1, 3, 1), 2).flatten()
    tensor([2., 7.])
    """
    whole = x.shape[2] // block * block
    means = x[:, :, :whole].unflatten(2, (-1, block)).mean(3) if whole else x[:, :, :0]
    return means if whole == x.shape[2] else torch.cat([means, x[:, :, whole:].mean(2, keepdim=True)], 2)


def block_sizes(length: int, block: int, device: torch.device) -> Tensor:
    """Tokens of each block."""
    return torch.tensor([min(block, length - first) for first in range(0, length, block)], device=device)
