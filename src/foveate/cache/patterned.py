"""Eviction by a static pattern: tokens stay as long as a later query may see them."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention import attend
from foveate.cache.keys_values import SLACK
from foveate.cache.memory import LayerMemory, Look, placed_rule
from foveate.patterns import Pattern, boolean_mask
from foveate.patterns.algebra import Boxes, Interval
from foveate.patterns.ranges import NEVER


class PatternMemory(LayerMemory):
    """A key-value cache without tokens that a pattern of positions, the same for all heads, hides from later queries.

    Many at a time: a quarter of those that are needed, and 32 at least, stay beyond their time.
    """

    def __init__(self, pattern: Pattern) -> None:
        if pattern.is_dynamic or pattern.needs_axes or pattern.heads > 1 or pattern.batches > 1:
            raise ValueError(f"a cache evicts by a pattern of positions, the same for all heads; got {pattern}")
        super().__init__()
        self.pattern = pattern

    def look(self, q: Tensor, look: Look) -> Tensor:
        assert self.slots is not None
        slots = self.slots
        if self.is_whole:
            return look.run(q, slots.k, slots.v, self.pattern & placed_rule(slots, look), **look.options)
        position = slots.position
        own = self.pattern.visible(0, 0, look.position[:, None, :, None], position.unsqueeze(2))
        seen = (look.visible(position) & own).repeat_interleave(q.shape[1] // position.shape[1], dim=1)
        return attend(q, slots.k, slots.v, boolean_mask(seen), **look.options_at(position))

    def settle(self, q: Tensor, look: Look) -> None:
        assert self.slots is not None
        needed = self.needed(self.slots.position, look.position.amax(1) + 1)
        most = int(needed.sum(-1).max())
        if self.slots.count - most >= max(most // 4, SLACK):
            kept = needed.int().topk(most, dim=2).indices.sort(dim=2).values
            self.slots = self.slots.take(kept)

    def needed(self, position: Tensor, now: Tensor) -> Tensor:
        """Whether a query at ``now`` (B,) or later may see keys at positions (B, G, S)."""
        first = now[:, None, None].expand_as(position).flatten()
        keys = position.flatten()
        places = Interval(first, torch.full_like(first, NEVER), keys, keys)
        zero = torch.zeros_like(first)
        return self.pattern.bounds(Boxes(zero, zero, places)).some.view(position.shape) & (position >= 0)
