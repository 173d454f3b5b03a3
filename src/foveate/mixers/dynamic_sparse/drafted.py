"""Keys for a large model's queries that a small model's attention weights choose: top-p without a sort."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Unpack

import torch
from torch import Tensor

from foveate.attention import attend
from foveate.attention.biases import as_tuple
from foveate.mixers.core import CoreOptions
from foveate.patterns import Pattern, Scene, Sequence, boolean_mask, full
from foveate.patterns.algebra import resolve
from foveate.patterns.rules.choose import NEVER, score
from foveate.patterns.select.dense import rows_of_mask
from foveate.precision import to_accum

HALVINGS = 48  # of the threshold: beyond what float32 tells apart


@torch.no_grad()
def mean_weights(q: Tensor, k: Tensor, rows: Tensor, within: Pattern, options: CoreOptions) -> Tensor:
    """Softmax weights of the queries of numbers ``rows`` (n,), the mean over heads, (B, n, M)."""
    scale = options.get("scale")
    scene = Scene(q.shape[2], k.shape[2], options.get("layout") or Sequence(), q.detach(), k.detach(), scale)
    seen = rows_of_mask(resolve(within, scene), scene, rows, q.shape[1])
    logits = score(q[:, :, rows], to_accum(k) * (q.shape[3] ** -0.5 if scale is None else scale))
    return logits.masked_fill_(~seen, NEVER).softmax(-1).mean(1)


def top_p(weights: Tensor, p: float) -> Tensor:
    """True at the greatest weights of each row that together are at least ``p`` of its sum, found without a sort.

    The least weight that is kept is found by halving: what is at least a threshold is summed up, 48 times. Weights that
    equal the least one are kept as well.

    >>> top_p(torch.tensor([[0.1, 0.5, 0.3, 0.1], [0.0, 0.9, 0.1, 0.0]]), 0.75)
    tensor([[False,  True,  True, False],
            [False,  True, False, False]])
    """
    if p >= 1:
        return torch.ones_like(weights, dtype=torch.bool)
    wanted = p * weights.sum(-1, keepdim=True)
    low, high = torch.zeros_like(wanted), weights.amax(-1, keepdim=True)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = torch.where(weights >= middle, weights, 0.0).sum(-1, keepdim=True) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    most = torch.where(weights >= high, weights, 0.0).sum(-1, keepdim=True) >= wanted
    return weights >= torch.where(most, high, low)


@dataclass(eq=False)
class Drafted:
    """What a draft model's layers attended to for the tokens that it proposed, and what the target read by it.

    ``rows`` are mean weights over heads (B, M) by layer and by the query's position.
    """

    rows: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    read: int = 0  # keys that the target read in verifications
    dense: int = 0  # those it would have read

    def write(self, layer: int, position: int, weights: Tensor, begins: bool) -> None:
        """Note a query's weights; those of tokens since taken back, or of the text before, are let go of."""
        own = self.rows.get(layer, {})
        kept = {} if begins else {other: row for other, row in own.items() if other < position}
        self.rows[layer] = kept | {position: weights}

    def of(self, layer: int, queries: int, keys: int) -> list[Tensor] | None:
        """The rows of the drafted tokens that so many last queries verify; None if these are no such tokens."""
        own, wanted = self.rows.get(layer, {}), range(keys - queries, keys - 1)
        if not 2 <= queries < keys or any(position not in own for position in wanted):
            return None
        self.rows[layer] = {position: own[position] for position in wanted}  # earlier ones have had their turn
        return [own[position] for position in wanted]


@dataclass(eq=False)
class DraftingCore:
    """Plain attention that notes the last query's mean weights, in a layer of the draft model."""

    layer: int
    drafted: Drafted
    pattern: Pattern = full

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, within: Pattern = full, **options: Unpack[CoreOptions]
    ) -> Tensor:
        if q.shape[2]:
            last = torch.tensor([q.shape[2] - 1], device=q.device)
            begins = q.shape[2] == k.shape[2]
            weights = mean_weights(q, k, last, within, options)[:, 0]
            self.drafted.write(self.layer, k.shape[2] - 1, weights, begins)
        return attend(q, k, v, within, **options)


@dataclass(eq=False)
class VerifyingCore:
    """Attention of drafted tokens to one another and to the top-p keys of a draft layer's weights, gathered.

    The weights are the mean over the drafted tokens. Calls that verify no drafted tokens see all.
    """

    draft_layer: int
    p: float
    drafted: Drafted
    pattern: Pattern = full

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, within: Pattern = full, **options: Unpack[CoreOptions]
    ) -> Tensor:
        count, length = q.shape[2], k.shape[2]
        rows = self.drafted.of(self.draft_layer, count, length)
        if rows is None or len(rows[0]) != len(q):
            return attend(q, k, v, within, **options)
        if as_tuple(options.get("bias")):
            raise ValueError("keys are gathered by a draft's weights: this model adds biases by their places")
        old = torch.stack([row[:, : length - count] for row in rows]).mean(0)
        chosen = torch.cat([top_p(old, self.p), old.new_ones(len(q), count, dtype=torch.bool)], 1)
        scene = Scene(count, length, options.get("layout") or Sequence(), q.detach(), k.detach(), options.get("scale"))
        seen = rows_of_mask(resolve(within, scene), scene, torch.arange(count, device=q.device), q.shape[1])
        seen = seen.expand(len(q), -1, -1, -1)
        outs = []
        for entry, own in enumerate(chosen):
            at, one = own.nonzero().squeeze(1), slice(entry, entry + 1)
            pattern = boolean_mask(seen[one][..., at])
            self.drafted.read, self.drafted.dense = self.drafted.read + len(at), self.drafted.dense + length
            outs.append(attend(q[one], k[one][:, :, at], v[one][:, :, at], pattern, **options))
        return torch.cat(outs)


def divergence(target: Tensor, draft: Tensor) -> Tensor:
    """The mean over rows of KL(target ‖ draft) of weights (B, n, M)."""
    least = torch.finfo(target.dtype).tiny
    apart = torch.xlogy(target, target.clamp_min(least)) - torch.xlogy(target, draft.clamp_min(least))
    return apart.sum(-1).mean()
