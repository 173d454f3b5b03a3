"""A dynamic pattern of blocks that are ranked by a few mean heads, with a budget of each head's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.patterns.algebra import Pattern, Scene
from foveate.patterns.rules.choice import PromptChoice, counted_from
from foveate.patterns.rules.choose import NEVER, fewest, score
from foveate.patterns.rules.decided import block_table, pack_rows
from foveate.patterns.rules.sequence import positive
from foveate.precision import to_accum


@dataclass(frozen=True, eq=False, repr=False)
class ProxyBlocks(PromptChoice):
    mass: float
    block: int
    proxies: int

    @property
    def sees_all(self) -> bool:  # type: ignore[override]
        return self.mass >= 1

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"proxy_blocks({self.mass}, block={self.block}, proxies={self.proxies})"

    def chosen(self, q: Tensor, keys: Tensor, scene: Scene) -> Pattern:
        heads, block = q.shape[1], self.block
        if heads % self.proxies or (keys.shape[1] % self.proxies and self.proxies % keys.shape[1]):
            raise ValueError(
                f"{self} takes heads in {self.proxies} groups; got {heads} heads on {keys.shape[1]} of keys"
            )
        lead = scene.first % block
        offset = scene.offset + lead
        judged = self._importance(q, keys, scene, offset, lead)  # (B, proxies, R, C)
        own = torch.arange(judged.shape[2], device=q.device) + offset // block
        budget = (self._budgets(q, keys, scene, lead) * (own + 1) - 1e-9).ceil()  # (B, H, R)
        place = judged.sort(dim=3, descending=True, stable=True).indices.argsort(
            3
        )  # of each block among those of its row
        chosen = place.repeat_interleave(heads // self.proxies, 1) < budget.unsqueeze(3)
        chosen |= torch.arange(judged.shape[3], device=q.device) == own.unsqueeze(1)
        start = offset // block * block
        table = block_table(pack_rows(chosen, block), chosen.shape[2], q_block=block, k_block=block, q_start=start)
        return counted_from(scene.first - lead, table)

    def _importance(self, q: Tensor, keys: Tensor, scene: Scene, offset: int, lead: int) -> Tensor:
        """The greatest softmax weight of the mean heads in each block before the own; NEVER from there on."""
        rows = to_accum(q).unflatten(1, (self.proxies, -1)).mean(2)
        mean = keys.unflatten(1, (self.proxies, -1)).mean(2) if keys.shape[1] >= self.proxies else keys
        found = []
        into = offset % self.block
        for first in range(-into, q.shape[2], self.block):
            part = slice(max(first, 0), min(first + self.block, q.shape[2]))
            weights = _causal_weights(rows[:, :, part], mean[:, :, : part.stop + scene.offset], scene, part.start)
            found.append(_in_blocks(weights, self.block, lead, NEVER).amax(-1).amax(2))
        place = torch.arange(len(found), device=q.device) + offset // self.block
        blocks = found[-1].shape[2]
        importance = torch.stack([pad(row, (0, blocks - row.shape[2]), value=NEVER) for row in found], 2)
        return importance.masked_fill(torch.arange(importance.shape[3], device=q.device) >= place.unsqueeze(1), NEVER)

    def _budgets(self, q: Tensor, keys: Tensor, scene: Scene, lead: int) -> Tensor:
        """The share (B, H, 1) of its blocks that each head needs, by the exact weights of the last block of queries."""
        first = max(q.shape[2] - self.block, 0)
        weights = _causal_weights(to_accum(q[:, :, first:]), keys, scene, first).mean(2, keepdim=True)
        share = _in_blocks(weights, self.block, lead, 0.0).sum(-1)[:, :, 0]  # (B, H, C)
        needed = fewest(share, self.mass).sum(-1, keepdim=True)
        return needed.double() / share.shape[-1]


def _causal_weights(rows: Tensor, keys: Tensor, scene: Scene, first: int) -> Tensor:
    """Softmax weights (B, H, n, M) of queries from number ``first`` on."""
    place = (torch.arange(rows.shape[2], device=rows.device) + first + scene.offset).unsqueeze(1)
    key = torch.arange(keys.shape[2], device=rows.device)
    hidden = key > place
    if scene.reach is not None:
        hidden |= key < place - scene.reach
    return score(rows, keys).masked_fill_(hidden, NEVER).softmax(-1)


def _in_blocks(weights: Tensor, block: int, lead: int, beyond: float) -> Tensor:
    """(..., M) as (..., C, block), the first of which lacks ``lead`` keys."""
    return pad(weights, (lead, (-lead - weights.shape[-1]) % block), value=beyond).unflatten(-1, (-1, block))


def proxy_blocks(mass: float, *, block: int = 64, proxies: int = 1) -> Pattern:
    """The blocks of keys that mean heads rank first, as many for each head as it needs for ``mass`` of its weights.

    Heads are divided into ``proxies`` groups; the mean queries and keys of a group attend in place of its heads, and
    a block is as important as the greatest of their weights in it. How many blocks a head sees is told by the exact
    weights of its last ``block`` queries: the share of blocks that hold ``mass`` of them, rounded up in every row. A
    query sees its own block besides, no key after itself, and everything if ``mass=1``.

    Wang et al., ProxyAttn: Guided Sparse Attention via Representative Heads, arXiv 2509.24745.

    >>> q, k = torch.ones(1, 2, 6, 1), torch.tensor([5.0, 5, 0, 0, 0, 0]).view(1, 1, 6, 1)
    >>> proxy_blocks(0.5, block=2).select(q, k, tile=8).to_dense()[0, 0].int()
    tensor([[1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 0],
            [1, 1, 0, 0, 1, 1]], dtype=torch.int32)

    Raises ValueError unless 0 < mass <= 1 and block and proxies are at least 1.
    """
    if isinstance(mass, bool) or not isinstance(mass, int | float) or not 0 < mass <= 1:
        raise ValueError(f"proxy_blocks takes a mass above 0 and at most 1; got {mass!r}")
    return ProxyBlocks(mass, positive("proxy_blocks", "block", block), positive("proxy_blocks", "proxies", proxies))
