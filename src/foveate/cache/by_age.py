"""Keys and values in fewer bits the older they are: tokens are rounded again each time they pass an age."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.attention import attend_partial, merge
from foveate.attention.stored import pack, unpack

STORED = (2, 4, 8)  # bits that a code may have


@dataclass(frozen=True, eq=False)
class Rounded:
    """Tokens (B, G, S, D) as whole numbers, packed, with a scale for each token of a head; ``bits`` and D beside."""

    codes: Tensor  # (B, G, S, D bits / 8) uint8
    scale: Tensor  # (B, G, S, 1)
    bits: int
    dim: int

    @classmethod
    def of(cls, x: Tensor, bits: int) -> Rounded:
        """The nearest multiples of a token's greatest magnitude over 2^(bits - 1) - 1."""
        most = 2 ** (bits - 1) - 1
        scale = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / most
        codes = ((x / scale).round() + most).to(torch.uint8)
        return cls(codes if bits == 8 else pack(codes, bits), scale, bits, x.shape[-1])

    @property
    def values(self) -> Tensor:
        """The tokens as they are rounded, (B, G, S, D)."""
        codes = self.codes if self.bits == 8 else unpack(self.codes, self.bits, self.dim)
        return (codes.to(self.scale.dtype) - (2 ** (self.bits - 1) - 1)) * self.scale

    @property
    def count(self) -> int:
        return self.codes.shape[2]

    def cut(self, part: slice) -> Rounded:
        return replace(self, codes=self.codes[:, :, part], scale=self.scale[:, :, part])

    def joined(self, later: Rounded) -> Rounded:
        """These tokens and later ones of as many bits."""
        codes, scale = (torch.cat(both, 2) for both in ((self.codes, later.codes), (self.scale, later.scale)))
        return replace(self, codes=codes, scale=scale)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


@dataclass(frozen=True)
class AgeCache:
    """A cache of steps of a staircase: ``(tokens, bits)`` from the newest tokens on, the last step without an end.

    The newest tokens are stored in the bits of the first step; the oldest of a step that has too many are rounded to
    those of the next, from what was stored of them. A cache is a value: appending returns another.

    Li, The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI, arXiv
    2410.18441, proposes such staircases; rounding, scales and steps are Foveate's.

    >>> cache = AgeCache(((2, 8), (None, 2)))
    >>> for _ in range(5):
    ...     k, v = torch.randn(2, 1, 1, 1, 16).unbind(0)
    ...     cache = cache.append(k, v)
    >>> [(k.count, k.bits) for k, _ in cache.tiers]  # the oldest first
    [(3, 2), (2, 8)]
    >>> cache.attend(torch.randn(1, 2, 1, 16)).shape
    torch.Size([1, 2, 1, 16])

    Raises ValueError for steps that are not numbers of tokens with 2, 4 or 8 bits, no fewer than the next.
    """

    steps: Sequence[tuple[int | None, int]] = ((64, 8), (192, 4), (None, 2))
    tiers: tuple[tuple[Rounded, Rounded], ...] = ()  # keys and values, the oldest first

    def __post_init__(self) -> None:
        *inner, last = self.steps
        falls = all(one[1] >= other[1] for one, other in zip(self.steps, self.steps[1:], strict=False))
        sizes = all(isinstance(tokens, int) and tokens > 0 for tokens, _ in inner)
        if last[0] is not None or not sizes or not falls or any(bits not in STORED for _, bits in self.steps):
            raise ValueError(
                f"steps are (tokens, bits) with bits of {STORED} that do not grow, the last (None, bits); got"
                f" {list(self.steps)}"
            )

    def append(self, k: Tensor, v: Tensor) -> AgeCache:
        """With the keys and values (B, G, n, D) of the next tokens."""
        held = list(reversed(self.tiers))  # the newest first
        kept: list[tuple[Rounded, Rounded]] = []
        coming: tuple[Tensor, Tensor] | None = (k, v)
        for number, (room, bits) in enumerate(self.steps):
            pair = held[number] if number < len(held) else None
            if coming is not None:
                fresh = Rounded.of(coming[0], bits), Rounded.of(coming[1], bits)
                pair = fresh if pair is None else (pair[0].joined(fresh[0]), pair[1].joined(fresh[1]))
            if pair is None:
                break
            over = 0 if room is None else max(pair[0].count - room, 0)
            coming = (pair[0].cut(slice(over)).values, pair[1].cut(slice(over)).values) if over else None
            kept.append((pair[0].cut(slice(over, None)), pair[1].cut(slice(over, None))))
        return AgeCache(self.steps, tuple(reversed(kept)))

    def attend(self, q: Tensor, *, scale: float | None = None) -> Tensor:
        """Attention of queries (B, H, n, D) to all tokens, step by step: no more than one is widened at a time."""
        if not self.tiers:
            raise ValueError("nothing is cached yet: append keys and values first")
        return merge([attend_partial(q, k.values, v.values, scale=scale) for k, v in self.tiers]).out

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and scales kept."""
        return sum(one.nbytes for tier in self.tiers for one in tier)
