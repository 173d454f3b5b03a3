"""Keys and values of the tokens that a layer keeps, in any order, with the position of each."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.cache.tokens import Tokens

FREE = -1  # in the place of a position: no token is there


class Slots:
    """Keys (B, G, S, D), values (B, G, S, Dv) and positions (B, G, S) int64 of kept tokens; FREE where there is none.

    Each head of each entry may keep other tokens than the rest. Attention does not ask for an order, so a token that
    comes may take the slot of one that goes: a ring buffer, without moving what stays.

    >>> slots = Slots(batch=1).append(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), torch.arange(3).expand(1, 2, 3))
    >>> slots.write(torch.tensor([[0, 2]]), torch.ones(1, 2, 4), torch.ones(1, 2, 4), torch.tensor([[3, 3]])).position
    tensor([[[3, 1, 2],
             [0, 1, 3]]])
    """

    __slots__ = ("tokens",)

    def __init__(self, batch: int, most: int | None = None) -> None:
        self.tokens = Tokens(batch, None, most)

    def _with(self, tokens: Tokens) -> Slots:
        after = Slots.__new__(Slots)
        after.tokens = tokens
        return after

    @property
    def k(self) -> Tensor:
        return self.tokens[0]

    @property
    def v(self) -> Tensor:
        return self.tokens[1]

    @property
    def position(self) -> Tensor:
        return self.tokens[2][..., 0]

    @property
    def count(self) -> int:
        return self.tokens.length

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes

    def append(self, k: Tensor, v: Tensor, position: Tensor) -> Slots:
        """With more tokens: k (B, G, N, D), v (B, G, N, Dv), position (B, G, N)."""
        return self._with(self.tokens.append(k, v, position.unsqueeze(-1).contiguous()))

    def write(self, slot: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Slots:
        """With one token in the slot (B, G) of each head, over what was there: k (B, G, D), v (B, G, Dv)."""
        new = (k, v, position.unsqueeze(-1))
        if torch.is_grad_enabled():
            return self._with(
                self.tokens.changed(tuple(_written(*each, slot) for each in zip(self._all, new, strict=True)))
            )
        for kept, x in zip(self._all, new, strict=True):
            index = slot[..., None, None].expand(-1, -1, 1, kept.shape[3])
            kept.scatter_(2, index, x.unsqueeze(2).to(kept.dtype))
        return self

    def with_keys(self, slots: Tensor, keys: Tensor) -> Slots:
        """With other keys (B, G, K, D) in some slots (B, G, K)."""
        index = slots.unsqueeze(-1).expand(-1, -1, -1, keys.shape[3])
        if torch.is_grad_enabled():
            return self._with(self.tokens.changed((self.k.scatter(2, index, keys), *self._all[1:])))
        self.k.scatter_(2, index, keys.to(self.k.dtype))
        return self

    def take(self, index: Tensor, most: int | None = None) -> Slots:
        """Only the slots (B, G, K) of each head, in memory of their own with room for ``most``."""
        taken = tuple(x.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[3])) for x in self._all)
        return self._with(Tokens(index.shape[0], None, most).append(*taken))

    def freed(self, hidden: Tensor) -> Slots:
        """Without tokens where ``hidden`` (B, G, S) is True; their slots stay."""
        position = self.position.masked_fill(hidden, FREE).unsqueeze(-1)
        return self._with(self.tokens.changed((self.k, self.v, position)))

    def first(self, count: int) -> Slots:
        """Without those behind the first ``count``."""
        return self._with(self.tokens.keep([(0, count)]))

    def entries(self, index: Tensor) -> Slots:
        """Batch entries (B',) of these, any of them several times."""
        if not self.count:
            return Slots(len(index), self.tokens.most)
        return self._with(
            Tokens(len(index), None, self.tokens.most).append(*(x[index.to(x.device)] for x in self._all))
        )

    @property
    def _all(self) -> tuple[Tensor, ...]:
        return self.tokens.tensors


def _written(kept: Tensor, new: Tensor, slot: Tensor) -> Tensor:
    index = slot[..., None, None].expand(-1, -1, 1, kept.shape[3])
    return kept.scatter(2, index, new.unsqueeze(2).to(kept.dtype))
