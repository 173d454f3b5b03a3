"""Some of the tokens of a cache, and where they lie: in one piece, in pages, as many as each head has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention.stored.codes import Codes

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Segment:
    """Keys and values of tokens that lie in pages, each a tensor of floats or `Codes`.

    ``k`` is (P, E, S, D) and ``v`` (P, E, S, Dv): P pages of S tokens, of all key heads (E = G) or of one (E = 1).
    ``pages`` (B, G or 1, T) int64 lists the pages of each batch entry and key head, in the order of their tokens;
    None: page b is all of entry b. ``lengths`` (B, G or 1) int64 says how many of their slots hold tokens, from the
    first on; None: all. Entries of ``pages`` behind those that are needed may be any. ``bias`` (B or 1, H or 1, N or
    1, T S) is added to the logits of each slot.

    >>> pool = torch.randn(9, 1, 16, 8)  # 9 pages of 16 tokens, each of one head
    >>> ragged = Segment(pool, pool, torch.tensor([[[4, 0, 7], [8, 0, 0]]]), torch.tensor([[40, 3]]))
    >>> ragged.batch, ragged.heads, ragged.slots, ragged.counts.tolist()
    (1, 2, 48, [[40, 3]])

    Raises ValueError for tensors that do not belong together, TypeError for dtypes other than these.
    """

    k: Codes | Tensor
    v: Codes | Tensor
    pages: Tensor | None = None
    lengths: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        k, v = tuple(self.k.shape), tuple(self.v.shape)
        if len(k) != 4 or len(v) != 4 or k[:3] != v[:3]:
            raise ValueError(f"keys and values are (pages, heads, tokens, channels) of as many tokens; got {k} and {v}")
        for x in (self.k, self.v):
            if isinstance(x, Tensor) and x.dtype not in FLOATS:
                raise TypeError(f"keys and values are floats, or Codes (see quantise); got {x.dtype}")
        for name, numbers, dims in (("pages", self.pages, 3), ("lengths", self.lengths, 2)):
            if numbers is not None and (numbers.dtype != torch.int64 or numbers.dim() != dims):
                raise TypeError(f"{name} is int64 with {dims} dims; got {numbers.dtype} {tuple(numbers.shape)}")
        if self.pages is not None and self.pages.shape[1] > 1 and k[1] not in (1, self.pages.shape[1]):
            raise ValueError(f"pages of {self.pages.shape[1]} heads, but a page holds {k[1]}")
        if self.lengths is not None:
            want = (self.batch, self.heads)
            if self.lengths.shape[0] != want[0] or self.lengths.shape[1] not in (1, want[1]):
                raise ValueError(f"lengths is (B, G or 1) = {want}; got {tuple(self.lengths.shape)}")

    @property
    def batch(self) -> int:
        return int(self.k.shape[0] if self.pages is None else self.pages.shape[0])

    @property
    def heads(self) -> int:
        """Key heads G."""
        return int(self.k.shape[1] if self.pages is None else max(self.k.shape[1], self.pages.shape[1]))

    @property
    def slots(self) -> int:
        """Room for so many tokens of a head, T S."""
        return int(self.k.shape[2]) * (1 if self.pages is None else self.pages.shape[2])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that there are."""
        parts = [(x,) if isinstance(x, Tensor) else x.tensors for x in (self.k, self.v)]
        return (*parts[0], *parts[1], *(x for x in (self.pages, self.lengths, self.bias) if x is not None))

    @property
    def counts(self) -> Tensor:
        """Tokens of each head, (B, G) int64."""
        if self.lengths is None:
            return torch.full((self.batch, self.heads), self.slots, dtype=torch.int64, device=self.tensors[0].device)
        return self.lengths.expand(self.batch, self.heads)

    def gathered(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys (B, G, T S, D) and values as numbers, whatever lies in slots without tokens."""
        return self._gathered(self.k, dtype), self._gathered(self.v, dtype)

    def _gathered(self, x: Codes | Tensor, dtype: torch.dtype) -> Tensor:
        if self.pages is None:
            return x.to(dtype) if isinstance(x, Tensor) else x.numbers(dtype)
        pages = self.pages.clamp(0, max(x.shape[0] - 1, 0))
        own = torch.arange(self.heads, device=pages.device) if x.shape[1] > 1 else pages.new_zeros(self.heads)
        index = pages.expand(-1, self.heads, -1), own.view(1, -1, 1)  # (B, G, T)
        numbers = x[index].to(dtype) if isinstance(x, Tensor) else x.at(index).numbers(dtype)
        return numbers.flatten(2, 3)
