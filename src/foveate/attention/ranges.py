"""attend over ranges of keys: what a decoding step reads, at the cost of a dense call over as many keys.

A selection in tiles serves 64 queries at a time; one query that reads a few stretches of a long cache would pay for 64.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.attention.api import ATTEND, attend
from foveate.attention.cost import empty_heads
from foveate.attention.impl.short import described
from foveate.attention.weights import Weights
from foveate.counting import Cost, counted
from foveate.kernels.cpu import call as c
from foveate.kernels.cpu.loader import library
from foveate.patterns.band import Band
from foveate.patterns.ranges import Ranges
from foveate.patterns.rules.choose import NEVER, best
from foveate.patterns.rules.masks import boolean_mask
from foveate.plain import is_plain

EVERY = Band(0, 0)  # ranges stand in its place
SEEN = struct.Struct("q" * 8)  # FoveateRanges of csrc/abi.h

Kernel = Callable[[bytes, bytes], int]


class KeyRanges(NamedTuple):
    """Key slots [first, end) that all queries of a head see; ranges of a row, a batch entry and head, do not overlap.

    ``batches`` and ``heads`` are those that the lists tell apart, 1 if none; consecutive query heads share a row. Row r
    owns the ranges ``starts[r]`` to ``starts[r + 1]``.
    """

    batches: int
    heads: int
    starts: Tensor | array[int]  # (rows + 1,) int64
    ranges: Tensor | array[int]  # (R, 2) int64, in a row

    @classmethod
    def of(cls, heads: Sequence[Ranges]) -> KeyRanges:
        """Those of each head, the same in all batch entries.

        >>> KeyRanges.of([((0, 2), (6, 10))]).ranges
        array('q', [0, 2, 6, 10])
        """
        starts = [0]
        flat: list[int] = []
        for ranges in heads:
            for pair in ranges:
                flat += pair
            starts.append(len(flat) // 2)
        return cls(1, len(heads), array("q", starts), array("q", flat))

    @classmethod
    def of_blocks(cls, chosen: Tensor, size: int, num_keys: int) -> KeyRanges:
        """Chosen blocks of ``size`` keys, booleans (B, H, C), of which the last may lack keys.

        >>> KeyRanges.of_blocks(torch.tensor([[[True, False, True]]]), 4, 10).ranges
        tensor([[ 0,  4],
                [ 8, 10]])
        """
        first = chosen.nonzero()[:, 2] * size
        starts = torch.zeros(chosen.shape[0] * chosen.shape[1] + 1, dtype=torch.long, device=chosen.device)
        torch.cumsum(chosen.sum(2).flatten(), 0, out=starts[1:])
        return cls(
            chosen.shape[0], chosen.shape[1], starts, torch.stack([first, (first + size).clamp_max(num_keys)], 1)
        )

    @classmethod
    def of_best(cls, scores: Tensor, count: int, size: int, num_keys: int, *, own: int | None = None) -> KeyRanges:
        """The ``count`` < C blocks of ``size`` keys with the best scores (B, H, C), and block ``own``, which has none.

        >>> KeyRanges.of_best(torch.tensor([[[1.0, 3.0, 2.0]]]), 1, 4, 14, own=3).ranges
        array('q', [4, 8, 12, 14])
        """
        values, order = scores.topk(
            count + 1
        )  # lists, as these few numbers are sooner walked than ten operators called
        clear = all(row[count] > NEVER and row[count - 1] > row[count] for row in values.flatten(0, 1).tolist())
        if not clear and count:  # of equal ones the first
            marks = best(scores, count)
            return cls.of_blocks(marks if own is None else _with_block(marks, own), size, num_keys)
        last = () if own is None else (own,)
        rows = [(*row[:count], *last) for row in order.flatten(0, 1).tolist()]
        ranges = [edge for row in rows for block in row for edge in (block * size, min(block * size + size, num_keys))]
        each = count + len(last)
        starts = array("q", [each * row for row in range(len(rows) + 1)])
        return cls(scores.shape[0], scores.shape[1], starts, array("q", ranges))

    @property
    def total(self) -> int:
        """Keys of all lists."""
        return int(_as_tensor(self.ranges).view(-1, 2).diff(dim=1).sum())

    @property
    def single(self) -> tuple[int, int] | None:
        """The one range that all queries see, if that is known to be all."""
        if self.heads == 1 and isinstance(self.ranges, array) and len(self.ranges) == 2:
            return self.ranges[0], self.ranges[1]
        return None

    def mask(self, num_keys: int, device: torch.device) -> Tensor:
        """The same as booleans, (batches, heads, 1, M)."""
        starts, ranges = (_as_tensor(x).to(device) for x in (self.starts, self.ranges))
        row = torch.repeat_interleave(torch.arange(starts.numel() - 1, device=device), starts.diff())
        edges = torch.zeros(starts.numel() - 1, num_keys + 1, dtype=torch.long, device=device)
        for side, sign in enumerate((1, -1)):
            edges.index_put_((row, ranges.view(-1, 2)[:, side]), edges.new_tensor(sign), accumulate=True)
        return (edges.cumsum(1)[:, :num_keys] > 0).view(self.batches, self.heads, 1, num_keys)


def ranges_cost(q: Tensor, k: Tensor, v: Tensor, seen: KeyRanges, **_: Any) -> Cost:
    """Operations of attend_ranges: a product of D and one of Dv channels for each visible pair."""
    pairs = q.shape[0] * q.shape[1] // (seen.batches * seen.heads) * q.shape[2] * seen.total
    return Cost(2 * (q.shape[3] + v.shape[3]) * pairs, pairs, pairs)


@counted("attend", ranges_cost, empty_heads)
def attend_ranges(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: KeyRanges,
    *,
    bias: Tensor | None = None,
    weights: Weights | str = "softmax",
    scale: float | None = None,
) -> Tensor:
    """Attention of a few queries to ranges of keys, the same for all queries of a head; (B, H, N, Dv).

    >>> q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 900, 8), torch.randn(1, 2, 900, 8)
    >>> attend_ranges(q, k, v, KeyRanges.of([((0, 4), (600, 900))])).shape
    torch.Size([1, 4, 1, 8])

    Shapes and dtypes are those of ``attend``; ``bias``, (B or 1, H or 1, 1, M), is added to the logits of each key.
    """
    if seen.batches not in (1, q.shape[0]) or q.shape[1] % seen.heads:
        have = f"{seen.batches} entries and {seen.heads} heads"
        raise ValueError(f"ranges of {have}, but q has {q.shape[0]} and {q.shape[1]}")
    out = _natively(q, k, v, seen, bias, weights, scale)
    if out is not None:
        return out
    mask = seen.mask(k.shape[2], k.device)
    mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], dim=1) if mask.shape[1] > 1 else mask
    pattern = boolean_mask(mask.expand(-1, -1, q.shape[2], -1))
    return attend(q, k, v, pattern, bias=bias, weights=weights, scale=scale)


def _natively(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: KeyRanges,
    bias: Tensor | None,
    weights: Weights | str,
    scale: float | None,
) -> Tensor | None:
    """Heads out of a plain call; None if it is none."""
    kind = c.KINDS.get(weights) if isinstance(weights, str) else None
    kernel = _kernel() if kind is not None and ATTEND.takes("native", "auto") else None
    if kernel is None or kind is None:
        return None
    call = described(q, k, v, kind, scale, EVERY)
    listed = None if call is None else _argument(seen, bias, q.shape[0], q.shape[1], k.shape[2])
    if call is None or listed is None:
        return None
    argument, out = call
    c.check(kernel(argument, listed))
    return out


def _argument(seen: KeyRanges, bias: Tensor | None, batch: int, heads: int, num_keys: int) -> bytes | None:
    """The second argument of the kernel; None where the bias or the lists are none that it reads."""
    starts, ranges = _address(seen.starts), _address(seen.ranges)
    if not starts or (not ranges and len(seen.ranges)):
        return None
    if bias is None:
        return SEEN.pack(seen.batches, seen.heads, starts, ranges, 0, 0, 0, 0)
    if bias.dtype != torch.float32 or (bias.requires_grad and torch.is_grad_enabled()) or not is_plain(bias):
        return None
    address = c.strided(bias, (torch.float32,), bias.shape)
    strides = bias.expand(batch, heads, 1, num_keys).stride()
    return SEEN.pack(seen.batches, seen.heads, starts, ranges, address, strides[0], strides[1], strides[3])


def _with_block(marks: Tensor, block: int) -> Tensor:
    """Marks (B, H, C) with one more block behind the last."""
    return pad(pad(marks, (0, block - marks.shape[-1])), (0, 1), value=True)


def _address(numbers: Tensor | array[int]) -> int:
    """Where the kernel reads a list; 0 if it does not lie in order."""
    if isinstance(numbers, Tensor):
        return c.strided(numbers, (torch.int64,), numbers.shape) if numbers.is_contiguous() else 0
    return numbers.buffer_info()[0]


def _as_tensor(numbers: Tensor | array[int]) -> Tensor:
    return numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=torch.long, device="cpu")


@lru_cache(maxsize=1)
def _kernel() -> Kernel | None:
    found = library()
    if found is None:
        return None
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p, ctypes.c_char_p)(("foveate_attend_ranges", found))
