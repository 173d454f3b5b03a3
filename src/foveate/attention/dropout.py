"""Dropout on attention weights: which pair is dropped is a pure function of a seed and the pair's own numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_GOLDEN = 0x1E3779B9


class Dropout(NamedTuple):
    """A probability to drop each weight by, and an int64 seed () on the CPU.

    No state is kept: forward, backward, a recomputation and every implementation drop the same pairs.
    """

    p: float
    seed: Tensor
    batch: int = 0  # number of the first batch entry, query and key, where they are part of a call
    query: int = 0
    key: int = 0

    @property
    def numbers(self) -> Tensor:
        """Seed and first numbers as one tensor (4,), which operators of torch take."""
        first = torch.tensor((self.batch, self.query, self.key), dtype=torch.int64, device="cpu")
        return torch.cat([self.seed.view(1), first])

    @staticmethod
    def of(p: float, numbers: Tensor) -> Dropout:
        seed, *first = numbers.unbind()
        return Dropout(p, seed, *first)  # type: ignore[arg-type]

    def factor(self, batch: Tensor, head: Tensor, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
        """What each pair's weight is multiplied by, 0 or 1 / (1 - p); the indices broadcast against one another."""
        pair = batch + self.batch, head, q + self.query, k + self.key
        keep = _hash(self.seed, *pair) >= round(self.p * 2**32)
        return keep.to(dtype) / (1 - self.p)


def as_dropout(p: float, seed: int | Tensor | None, first: tuple[int, int] = (0, 0)) -> Dropout | None:
    """The checked dropout of a call whose first query and key have these numbers; without a seed, torch draws one."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout is a probability from 0 up to, but not, 1; got {p}")
    if not p:
        return None
    if seed is None:
        seed = torch.randint(2**62, (), dtype=torch.int64, device="cpu")
    elif isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.is_floating_point() or seed.is_complex():
            raise TypeError(f"seed is an integer; got a tensor of {seed.dtype}, shape {tuple(seed.shape)}")
        seed = seed.detach().reshape(()).to("cpu", torch.int64)
    elif isinstance(seed, int) and -(2**63) <= seed < 2**63:
        seed = torch.tensor(seed, dtype=torch.int64, device="cpu")
    else:
        raise TypeError(f"seed is an integer of 64 bits; got {seed!r}")
    return Dropout(float(p), seed, 0, *first)


def _hash(seed: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """32 random bits of each pair."""
    row = _mixed(_mixed(seed & _WORD) ^ (seed >> 32 & _WORD))
    for index in (batch, head, q):
        row = _mixed(row ^ _mixed(index + _GOLDEN))
    return _mixed(row ^ _mixed(k + _GOLDEN))


def _mixed(x: Tensor) -> Tensor:
    """A permutation of 32-bit words; its constants are below 2^31, so that no product leaves 63 bits.

    Ettinger, Wellons, Hash Prospector: [16 21f0aaad 15 735a2d97 15].
    """
    x = x & _WORD
    x = (x ^ x >> 16) * 0x21F0AAAD & _WORD
    x = (x ^ x >> 15) * 0x735A2D97 & _WORD
    return x ^ x >> 15
