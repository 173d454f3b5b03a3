"""Static patterns on sequences. Distances are query position minus key position."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.patterns.algebra import Bounds, Boxes, Index, Interval, Pattern, Scene, mix_hash


def distances(at: Interval) -> tuple[Tensor, Tensor]:
    """Least and greatest distance inside each box."""
    return at.q_lo - at.k_hi, at.q_hi - at.k_lo


class ByDistance(Pattern):
    """A pattern that depends on the distance alone: tiles on one diagonal hold equal masks."""

    def signature(self, boxes: Boxes) -> Tensor:
        return mix_hash(boxes.position.q_lo - boxes.position.k_lo)


class Full(ByDistance):
    """Every pair."""

    text = "full"

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return torch.ones_like(q + k, dtype=torch.bool)

    def bounds(self, boxes: Boxes) -> Bounds:
        every = torch.ones_like(boxes.position.q_lo, dtype=torch.bool)
        return Bounds(every, every)


class Causal(ByDistance):
    """No key beyond the query."""

    text = "causal"
    sees_future = False

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return k <= q

    def bounds(self, boxes: Boxes) -> Bounds:
        nearest, farthest = distances(boxes.position)
        return Bounds(some=farthest >= 0, every=nearest >= 0)


full = Full()
causal = Causal()


@dataclass(frozen=True, eq=False, repr=False)
class Window(ByDistance):
    left: int
    right: int

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"window({self.left})" if self.left == self.right else f"window({self.left}, {self.right})"

    @property
    def sees_future(self) -> bool:  # type: ignore[override]
        return self.right > 0

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return (q - k <= self.left) & (k - q <= self.right)

    def bounds(self, boxes: Boxes) -> Bounds:
        nearest, farthest = distances(boxes.position)
        return Bounds(
            some=(farthest >= -self.right) & (nearest <= self.left),
            every=(nearest >= -self.right) & (farthest <= self.left),
        )


def window(left: int, right: int | None = None) -> Pattern:
    """Keys at most ``left`` before and ``right`` (default: ``left``) after the query, itself included.

    Mistral's ``sliding_window=W`` is ``window(W - 1) & causal``: there W counts the query's own key.

    >>> window(1).mask(4)[0, 0].int()
    tensor([[1, 1, 0, 0],
            [1, 1, 1, 0],
            [0, 1, 1, 1],
            [0, 0, 1, 1]], dtype=torch.int32)

    Raises ValueError unless ``left`` is positive, or zero beside a positive ``right``.
    """
    right = left if right is None else right
    if not (_is_count(left) and _is_count(right)) or left == right == 0:
        raise ValueError(f"window(left, right) takes whole distances >= 0, not both 0; got ({left!r}, {right!r})")
    return Window(left, right)


@dataclass(frozen=True, eq=False, repr=False)
class Sinks(Pattern):
    count: int
    sees_future = False

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"sinks({self.count})"

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return (k < self.count) & (k <= q)

    def bounds(self, boxes: Boxes) -> Bounds:
        at = boxes.position
        return Bounds(
            some=(at.k_lo < self.count) & (at.k_lo <= at.q_hi),
            every=(at.k_hi < self.count) & (at.k_hi <= at.q_lo),
        )


def sinks(count: int) -> Pattern:
    """The first ``count`` keys, for every query at or after them (so it never shows the future).

    Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453.

    >>> sinks(1).mask(3)[0, 0].int()
    tensor([[1, 0, 0],
            [1, 0, 0],
            [1, 0, 0]], dtype=torch.int32)
    """
    return Sinks(_positive("sinks", "count", count))


@dataclass(frozen=True, eq=False, repr=False)
class Strided(ByDistance):
    """Distances that are multiples of a step, up to a reach (None: any)."""

    step: int
    reach: int | None

    @property
    def text(self) -> str:  # type: ignore[override]
        if self.reach is None:
            return f"strided({self.step})"
        return f"dilated({self.reach // self.step}, {self.step})"

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        distance = q - k
        on_step = distance % self.step == 0
        return on_step if self.reach is None else on_step & (distance.abs() <= self.reach)

    def bounds(self, boxes: Boxes) -> Bounds:
        nearest, farthest = distances(boxes.position)
        if self.reach is not None:
            nearest, farthest = nearest.clamp_min(-self.reach), farthest.clamp_max(self.reach)
        some = farthest.div(self.step, rounding_mode="floor") * self.step >= nearest
        inside = (farthest - nearest) == (boxes.position.q_hi - boxes.position.k_lo) - (
            boxes.position.q_lo - boxes.position.k_hi
        )
        every = some & inside & ((nearest == farthest) | (self.step == 1))
        return Bounds(some, every)


def strided(step: int) -> Pattern:
    """Keys at distances that are multiples of ``step``, on both sides.

    Child et al., Generating Long Sequences with Sparse Transformers, arXiv 1904.10509.

    >>> strided(3).allows(4, torch.arange(8)).int()
    tensor([0, 1, 0, 0, 1, 0, 0, 1], dtype=torch.int32)
    """
    return Strided(_positive("strided", "step", step), None)


def dilated(reach: int, step: int) -> Pattern:
    """A window of ``reach`` keys on each side, ``step`` apart.

    Beltagy et al., Longformer: The Long-Document Transformer, arXiv 2004.05150.

    >>> dilated(1, 3).allows(4, torch.arange(8)).int()
    tensor([0, 1, 0, 0, 1, 0, 0, 1], dtype=torch.int32)
    """
    return Strided(_positive("dilated", "step", step), _positive("dilated", "reach", reach) * step)


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Pattern):
    size: int

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"blocks({self.size})"

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return q // self.size == k // self.size

    def bounds(self, boxes: Boxes) -> Bounds:
        return same_group(*(edge // self.size for edge in boxes.position))

    def signature(self, boxes: Boxes) -> Tensor:
        at = boxes.position
        return mix_hash(at.q_lo % self.size, at.q_lo - at.k_lo)


def blocks(size: int) -> Pattern:
    """Keys of the query's own block of ``size`` tokens.

    >>> blocks(2).mask(4)[0, 0].int()
    tensor([[1, 1, 0, 0],
            [1, 1, 0, 0],
            [0, 0, 1, 1],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    return Blocks(_positive("blocks", "size", size))


@dataclass(frozen=True, eq=False, repr=False)
class Prefix(Pattern):
    count: int

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"prefix({self.count})"

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return (k < self.count) & (q == q)

    def bounds(self, boxes: Boxes) -> Bounds:
        return Bounds(some=boxes.position.k_lo < self.count, every=boxes.position.k_hi < self.count)


def prefix(count: int) -> Pattern:
    """The first ``count`` keys, for every query: ``causal | prefix(n)`` is a prefix language model.

    >>> (causal | prefix(2)).mask(3)[0, 0].int()
    tensor([[1, 1, 0],
            [1, 1, 0],
            [1, 1, 1]], dtype=torch.int32)
    """
    return Prefix(_positive("prefix", "count", count))


@dataclass(frozen=True, eq=False, repr=False)
class Documents(Pattern):
    lengths: tuple[int, ...]

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"documents({list(self.lengths)})"

    def number(self, position: Tensor) -> Tensor:
        """Document of each position; positions past the end belong to one more document."""
        ends = torch.tensor(self.lengths, device=position.device).cumsum(0)
        return torch.bucketize(position.contiguous(), ends, right=True)

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return self.number(q) == self.number(k)

    def bounds(self, boxes: Boxes) -> Bounds:
        return same_group(*(self.number(edge) for edge in boxes.position))


def documents(lengths: Iterable[int]) -> Pattern:
    """Keys of the query's own document, documents laid end to end with these lengths.

    >>> (documents([2, 1]) & causal).mask(3)[0, 0].int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 0, 1]], dtype=torch.int32)
    """
    lengths = tuple(int(n) for n in lengths)
    if not lengths or any(n < 0 for n in lengths):
        raise ValueError(f"documents takes the lengths of the documents, each >= 0; got {list(lengths)}")
    return Documents(lengths)


@dataclass(frozen=True, eq=False, repr=False)
class GlobalTokens(Pattern):
    positions: tuple[int, ...]

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"global_tokens({list(self.positions)})"

    def rank(self, position: Tensor, right: bool = False) -> Tensor:
        """How many global positions lie before (right: at or before) each position."""
        table = torch.tensor(self.positions, device=position.device)
        return torch.bucketize(position.contiguous(), table, right=right)

    def holds(self, position: Tensor) -> Tensor:
        return self.rank(position, right=True) > self.rank(position)

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return self.holds(q) | self.holds(k)

    def bounds(self, boxes: Boxes) -> Bounds:
        at = boxes.position
        in_q = self.rank(at.q_hi, right=True) - self.rank(at.q_lo)
        in_k = self.rank(at.k_hi, right=True) - self.rank(at.k_lo)
        every = (in_q == at.q_hi - at.q_lo + 1) | (in_k == at.k_hi - at.k_lo + 1)
        return Bounds(some=(in_q > 0) | (in_k > 0), every=every)


def global_tokens(positions: Iterable[int]) -> Pattern:
    """Tokens that see all and are seen by all (join with ``& causal`` where no future may be seen).

    Beltagy et al., Longformer, arXiv 2004.05150; Zaheer et al., Big Bird, arXiv 2007.14062.

    >>> global_tokens([1]).mask(3)[0, 0].int()
    tensor([[0, 1, 0],
            [1, 1, 1],
            [0, 1, 0]], dtype=torch.int32)
    """
    positions = tuple(sorted({int(p) for p in positions}))
    if not positions or positions[0] < 0:
        raise ValueError(f"global_tokens takes token positions >= 0; got {list(positions)}")
    return GlobalTokens(positions)


@dataclass(frozen=True, eq=False, repr=False)
class PowerOfTwo(Pattern):
    block: int
    sees_future = False

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"power_of_two({'' if self.block == 1 else self.block})"

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        distance = q // self.block - k // self.block
        return (distance > 0) & (distance & (distance - 1) == 0)

    def bounds(self, boxes: Boxes) -> Bounds:
        nearest, farthest = distances(Interval(*(edge // self.block for edge in boxes.position)))
        exponent = torch.frexp(farthest.clamp_min(1).double()).exponent - 1
        greatest = torch.ones_like(farthest) << exponent.long()
        some = (farthest > 0) & (greatest >= nearest.clamp_min(1))
        return Bounds(some, every=some & (nearest == farthest))

    def signature(self, boxes: Boxes) -> Tensor:
        at = boxes.position
        return mix_hash(at.q_lo % self.block, at.q_lo - at.k_lo)


def power_of_two(block: int = 1) -> Pattern:
    """Keys (or blocks of ``block`` keys) at distances 1, 2, 4, 8, ... before the query: log N of them.

    Chen et al., PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention,
    arXiv 2503.03588.

    >>> power_of_two().allows(8, torch.arange(9)).int()
    tensor([1, 0, 0, 0, 1, 0, 1, 1, 0], dtype=torch.int32)
    """
    return PowerOfTwo(_positive("power_of_two", "block", block))


@dataclass(frozen=True, eq=False, repr=False)
class RandomBlocks(Pattern):
    block: int
    density: float
    seed: int

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"random_blocks({self.block}, {self.density}, seed={self.seed})"

    def drawn(self, q_block: Tensor, k_block: Tensor) -> Tensor:
        """A coin per pair of blocks, the same whatever the lengths are."""
        code = mix_hash(q_block + torch.zeros_like(k_block), torch.full_like(q_block + k_block, self.seed), k_block)
        return (code >> 11 & 0xFFFFFFFF).double() / 2**32 < self.density

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return self.drawn(q // self.block, k // self.block)

    def bounds(self, boxes: Boxes) -> Bounds:
        q_lo, q_hi, k_lo, k_hi = (edge // self.block for edge in boxes.position)
        one_block = (q_lo == q_hi) & (k_lo == k_hi)
        drawn = self.drawn(q_lo, k_lo)
        return Bounds(some=~one_block | drawn, every=one_block & drawn)


def random_blocks(block: int, density: float, *, seed: int = 0) -> Pattern:
    """Each pair of blocks of ``block`` tokens is visible with probability ``density``, drawn from ``seed``.

    Zaheer et al., Big Bird: Transformers for Longer Sequences, arXiv 2007.14062.

    >>> 0.05 < random_blocks(4, 0.1, seed=1).mask(256).float().mean() < 0.15
    tensor(True)
    """
    if not (isinstance(density, (int, float)) and 0 <= density <= 1 and math.isfinite(density)):
        raise ValueError(f"random_blocks takes a density between 0 and 1; got {density!r}")
    return RandomBlocks(_positive("random_blocks", "block", block), float(density), int(seed))


@dataclass(frozen=True, eq=False, repr=False)
class KeyPadding(Pattern):
    """Keys marked True, per batch entry (and head)."""

    mask: Tensor  # (B, 1 or heads, M)

    text = "key_padding(...)"

    @property
    def batches(self) -> int:  # type: ignore[override]
        return self.mask.shape[0]

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.mask.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.mask,)

    def resolve(self, scene: Scene) -> Pattern:
        if self.mask.shape[-1] != scene.num_keys:
            raise ValueError(f"key_padding marks {self.mask.shape[-1]} keys, but there are {scene.num_keys}")
        return self

    def rows(self, batch: Index, head: Index) -> tuple[Index, Index]:
        B, H, _ = self.mask.shape
        return (batch if B > 1 else 0), (head if H > 1 else 0)

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return self.mask[(*self.rows(batch, head), k.clamp(0, self.mask.shape[-1] - 1))] & (q == q)

    def bounds(self, boxes: Boxes) -> Bounds:
        at, last = boxes.position, self.mask.shape[-1] - 1
        before = torch.nn.functional.pad(self.mask.long().cumsum(-1), (1, 0))
        low, high = at.k_lo.clamp(0, last), at.k_hi.clamp(0, last)
        row = self.rows(boxes.batch, boxes.head)
        marked = before[(*row, high + 1)] - before[(*row, low)]
        return Bounds(some=marked > 0, every=marked == high - low + 1)


def key_padding(mask: Tensor) -> Pattern:
    """Keys marked True in a boolean ``mask`` (B, M) or (B, H, M), for every query; padding is what is False.

    >>> key_padding(torch.tensor([[True, True, False]])).mask(3)[0, 0].int()
    tensor([[1, 1, 0],
            [1, 1, 0],
            [1, 1, 0]], dtype=torch.int32)
    """
    if mask.dim() not in (2, 3) or mask.dtype != torch.bool:
        raise ValueError(f"key_padding takes a boolean (B, M) or (B, H, M) mask; got {mask.dtype} {tuple(mask.shape)}")
    return KeyPadding(mask if mask.dim() == 3 else mask.unsqueeze(1))


def same_group(q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Bounds:
    """Bounds of "equal group number" where numbers never fall along the positions."""
    return Bounds(some=(q_lo <= k_hi) & (k_lo <= q_hi), every=(q_lo == k_hi) & (k_lo == q_hi))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _positive(pattern: str, name: str, value: int) -> int:
    if not _is_count(value) or value == 0:
        raise ValueError(f"{pattern} takes a whole {name} of at least 1; got {value!r}")
    return value
