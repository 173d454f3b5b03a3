"""A cache of context in groups that do not attend to one another, for queries that attend to all of them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from foveate.attention import Weights, attend_partial, merge
from foveate.attention.partial import Partial, with_sink
from foveate.cache.memory import LayerMemory, Look
from foveate.patterns import causal, same_bucket


class GroupedMemory(LayerMemory):
    """All tokens of a text that begins with groups of ``lengths`` tokens, each read as if it stood alone.

    Groups take the same positions: ending together (``align_ends``) or beginning together; what follows goes on behind
    the longest, sees all of them, and weighs what it sees of itself ``rescale`` times.
    """

    def __init__(self, lengths: tuple[int, ...], rescale: float, align_ends: bool) -> None:
        super().__init__()
        self.rescale, self.total = rescale, sum(lengths)
        longest = max(lengths)
        starts = accumulate((0, *lengths[:-1]))
        groups = [number for number, length in enumerate(lengths) for _ in range(length)]
        self.group = torch.tensor(groups, dtype=torch.long, device="cpu")
        moves = [
            longest - length - start if align_ends else -start for start, length in zip(starts, lengths, strict=True)
        ]
        every = [*(moves[number] for number in groups), longest - self.total]
        self.move = torch.tensor(every, dtype=torch.long, device="cpu")

    def moves(self, position: Tensor) -> Tensor:
        """By how much tokens at positions of the text are moved; padding stays."""
        found = self.move.to(position.device)[position.clamp(0, self.total)]
        return found.masked_fill(position < 0, 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, look: Look) -> Tensor:
        if look.turn is None or look.options.get("bias") is not None or look.width is not None:
            raise NotImplementedError(
                "groups share positions in models with rotary ones and no window; this layer has others"
            )
        moves = self.moves(look.position)
        return super().attend(look.turn(q, moves), look.turn(k, moves), v, replace(look, turn=None))

    def look(self, q: Tensor, look: Look) -> Tensor:
        assert self.slots is not None
        position = self.slots.position[:, 0]
        asked, kept = self.labels(look.position), self.labels(position)
        last = len(torch.unique(self.group))
        own_group = same_bucket(_only(asked, asked < last), _only(kept, kept < last)) & causal
        context = same_bucket(_as_one(asked == last), _as_one((kept >= 0) & (kept < last)))
        behind = same_bucket(_as_one(asked == last), _as_one(kept == last)) & causal
        weights = look.options.get("weights")
        options = {key: value for key, value in look.options.items() if key not in ("weights", "bias")}
        k, v = self.slots.k, self.slots.v
        of_groups = attend_partial(q, k, v, own_group | context, **options)
        of_itself = attend_partial(q, k, v, behind, **options)
        assert of_itself.lse is not None
        joined = merge([of_groups, Partial(of_itself.out, of_itself.lse + math.log(self.rescale))])
        sink = weights.sink if isinstance(weights, Weights) else None
        return (joined if sink is None else with_sink(joined, sink)).out

    def labels(self, position: Tensor) -> Tensor:
        """The group (B, N) of tokens at positions, one more than the last of what follows, -1 of padding."""
        table = torch.cat([self.group, self.group.amax(0, keepdim=True) + 1]).to(position.device)
        return table[position.clamp(0, self.total)].masked_fill(position < 0, -1)


def _only(labels: Tensor, of: Tensor) -> Tensor:
    return labels.masked_fill(~of, -1).unsqueeze(1)


def _as_one(marks: Tensor) -> Tensor:
    return torch.where(marks, 0, -1).unsqueeze(1)
