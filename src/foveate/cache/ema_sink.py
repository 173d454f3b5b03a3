"""A rolling cache whose sinks hold an exponential moving average of evicted keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

NOTHING = torch.empty(0, dtype=torch.float64, device="cpu")


class EMASinkCache:
    """The first block of tokens as sinks, the latest ``window`` blocks, and the sinks' average with those between.

    The first ``block`` tokens fill the sink slots and stay there; later ones fill the window. When it has more than
    ``window`` blocks, the oldest leaves and is averaged into the slots, keys and values each: S ← α S + (1 - α) e.
    So at most ``block * (1 + window)`` keys are ever kept. A cache is a value: appending returns another.

    Lu et al., Reward Forcing, arXiv 2512.04678 (EMA-Sink).

    >>> cache = EMASinkCache(window=2, alpha=0.5)
    >>> for number in (1.0, 2.0, 3.0, 4.0):
    ...     cache = cache.append(torch.full((1, 1, 1, 1), number), torch.full((1, 1, 1, 1), number))
    >>> cache.k.flatten(), cache.seen  # the first averaged with the second, the two latest
    (tensor([1.5000, 3.0000, 4.0000]), 4)
    """

    __slots__ = ("alpha", "block", "k", "seen", "v", "window")

    def __init__(self, *, window: int, block: int = 1, alpha: float = 0.999) -> None:
        if window < 1 or block < 1 or not 0 <= alpha <= 1:
            raise ValueError(
                f"window and block are at least 1, alpha is a share from 0 to 1; got {window}, {block} and {alpha}"
            )
        self.window, self.block, self.alpha, self.seen = window, block, alpha, 0
        self.k = self.v = NOTHING

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values kept."""
        return self.k.nbytes + self.v.nbytes

    def append(self, k: Tensor, v: Tensor) -> EMASinkCache:
        """With the keys and values (B, G, block, D) of the next block."""
        if k.shape[2] != self.block:
            raise ValueError(f"tokens come in blocks of {self.block}; got {k.shape[2]}")
        after = EMASinkCache(window=self.window, block=self.block, alpha=self.alpha)
        after.seen = self.seen + self.block
        after.k, after.v = (self._with(kept, new) for kept, new in ((self.k, k), (self.v, v)))
        return after

    def _with(self, kept: Tensor, new: Tensor) -> Tensor:
        if not self.seen:
            return new
        joined = torch.cat([kept, new], 2)
        if joined.shape[2] <= self.block * (1 + self.window):
            return joined
        sinks, evicted = joined[:, :, : self.block], joined[:, :, self.block : 2 * self.block]
        averaged = self.alpha * sinks + (1 - self.alpha) * evicted
        return torch.cat([averaged, joined[:, :, 2 * self.block :]], 2)
