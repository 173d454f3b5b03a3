"""Additive biases on the logits, as functions of (batch entry, head, query position, key position)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.layouts.place import Place, Slots
from foveate.patterns.algebra import Index


@dataclass(frozen=True, eq=False)
class Bias:
    """Base of all biases: each value is an entry of ``parameter``, times a factor of the positions.

    Positions ``q`` and ``k`` count from 0; all index arguments broadcast against one another.
    """

    parameter: Tensor

    def index(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        """Entry of the flattened parameter for each pair."""
        raise NotImplementedError

    def factor(self, q: Tensor, k: Tensor) -> Tensor | None:
        """What the entry is multiplied by; None is 1."""
        return None

    def values(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        """Bias of each pair."""
        values = self.parameter.flatten()[self.index(batch, head, q, k)]
        factor = self.factor(q, k)
        return values if factor is None else values * factor

    def add_grad(self, total: Tensor, grad: Tensor, batch: Index, head: Index, q: Tensor, k: Tensor) -> None:
        """Add the gradient of values to ``total``, the gradient of the flattened parameter."""
        factor = self.factor(q, k)
        grad = grad if factor is None else grad * factor
        index = self.index(batch, head, q, k).expand(grad.shape)
        total.index_add_(0, index.reshape(-1), grad.reshape(-1).to(total.dtype))

    def check(self, batch: int, heads: int, num_queries: int, num_keys: int) -> None:
        """Refuse a call this bias does not fit."""

    def in_documents(self, place: Place) -> bool:
        """Whether :meth:`of_document` and :meth:`moved` say what each document alone would be given."""
        return False

    def of_document(self, parameter: Tensor, batch: slice, queries: Slots, keys: Slots) -> Tensor:
        """The part, a view, of the parameter or of its gradient that belongs to one document."""
        return parameter

    def moved(self, parameter: Tensor, offset: int) -> Bias:
        """The same bias with this parameter where query 0 sits at position ``offset`` of the keys."""
        return replace(self, parameter=parameter)


@dataclass(frozen=True, eq=False)
class Dense(Bias):
    """A tensor (B, H, N, M), or 1 in place of any of them."""

    def in_documents(self, place: Place) -> bool:
        return place.keeps_distances

    def of_document(self, parameter: Tensor, batch: slice, queries: Slots, keys: Slots) -> Tensor:
        whole = slice(None)
        at = ((batch, parameter.shape[0]), (whole, 1), (queries, parameter.shape[2]), (keys, parameter.shape[3]))
        return parameter[tuple(part if size > 1 else whole for part, size in at)]

    def index(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        index = torch.zeros_like(q + k)
        for size, at in zip(self.parameter.shape, (batch, head, q, k), strict=True):
            index = index * size + (at if size > 1 else 0)
        return index

    def check(self, batch: int, heads: int, num_queries: int, num_keys: int) -> None:
        want = (batch, heads, num_queries, num_keys)
        if any(have not in (1, need) for have, need in zip(self.parameter.shape, want, strict=True)):
            raise ValueError(f"bias must broadcast to (B, H, N, M) = {want}; got {tuple(self.parameter.shape)}")


@dataclass(frozen=True, eq=False)
class PerHead(Bias):
    """One constant per head, or one for all heads: the bias of sigmoid attention."""

    def in_documents(self, place: Place) -> bool:
        return True

    def index(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return torch.zeros_like(q + k) + (head if self.parameter.numel() > 1 else 0)

    def check(self, batch: int, heads: int, num_queries: int, num_keys: int) -> None:
        if self.parameter.numel() > 1:
            _check_heads("the logit bias", self.parameter, heads)


@dataclass(frozen=True, eq=False)
class Alibi(Bias):
    """``-slope_h * |distance|``; a negative slope favours far keys. Query 0 sits at position ``offset``."""

    offset: int = 0

    def index(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return torch.zeros_like(q + k) + head

    def factor(self, q: Tensor, k: Tensor) -> Tensor | None:
        return -(q + self.offset - k).abs().to(self.parameter.dtype)

    def in_documents(self, place: Place) -> bool:
        return place.keeps_distances

    def moved(self, parameter: Tensor, offset: int) -> Bias:
        return replace(self, parameter=parameter, offset=offset)

    def check(self, batch: int, heads: int, num_queries: int, num_keys: int) -> None:
        _check_heads("alibi slopes", self.parameter, heads)


@dataclass(frozen=True, eq=False)
class RelativeTable(Bias):
    """A learned value per head and relative position, on a line or a grid.

    ``parameter`` is (H, R) with R the product of ``2 * reach + 1`` over the axes; offsets beyond the reach are
    clamped to it. ``dims`` are the sizes of the grid, empty for a line.
    """

    dims: tuple[int, ...] = ()
    reach: tuple[int, ...] = ()
    offset: int = 0

    def index(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        index = torch.zeros_like(q + k) + head
        for offset, reach in zip(self._offsets(q + self.offset, k), self.reach, strict=True):
            index = index * (2 * reach + 1) + offset.clamp(-reach, reach) + reach
        return index

    def in_documents(self, place: Place) -> bool:
        return place.keeps_distances and not self.dims

    def moved(self, parameter: Tensor, offset: int) -> Bias:
        return replace(self, parameter=parameter, offset=offset)

    def _offsets(self, q: Tensor, k: Tensor) -> list[Tensor]:
        if not self.dims:
            return [q - k]
        strides = [math.prod(self.dims[axis + 1 :]) for axis in range(len(self.dims))]
        sides = list(zip(strides, self.dims, strict=True))
        return [q // stride % size - k // stride % size for stride, size in sides]

    def check(self, batch: int, heads: int, num_queries: int, num_keys: int) -> None:
        _check_heads("the relative table", self.parameter, heads)


@dataclass(frozen=True, eq=False)
class LogDecay(Bias):
    """``c_i - c_j`` with c the running sums (B or 1, H or 1, M) of log gates. Query 0 sits at position ``offset``."""

    offset: int = 0

    def values(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        sums = self.parameter.flatten()
        return sums[self._entry(batch, head, q + self.offset)] - sums[self._entry(batch, head, k)]

    def add_grad(self, total: Tensor, grad: Tensor, batch: Index, head: Index, q: Tensor, k: Tensor) -> None:
        for place, summed, sign in ((q + self.offset, -1, 1), (k, -2, -1)):
            of_token = grad.sum(summed, keepdim=True).to(total.dtype)
            entry = self._entry(batch, head, place).expand(of_token.shape)
            total.index_add_(0, entry.reshape(-1), of_token.reshape(-1), alpha=sign)

    def _entry(self, batch: Index, head: Index, place: Tensor) -> Tensor:
        batches, heads, length = self.parameter.shape
        row = (batch if batches > 1 else 0) * heads + (head if heads > 1 else 0)
        return row * length + place

    def in_documents(self, place: Place) -> bool:
        return place.keeps_distances

    def of_document(self, parameter: Tensor, batch: slice, queries: Slots, keys: Slots) -> Tensor:
        return parameter[batch if len(parameter) > 1 else slice(None), :, keys]

    def moved(self, parameter: Tensor, offset: int) -> Bias:
        return replace(self, parameter=parameter, offset=offset)

    def as_dense(self, num_queries: int) -> tuple[Dense, ...]:
        """Row and column terms that add up to it in float32: whole numbers first, whose differences are exact."""
        sums = self.parameter
        whole = sums.detach().round()
        rows = slice(self.offset, self.offset + num_queries)
        parts = (part.float() for part in (whole, sums - whole))
        return tuple(Dense(x) for part in parts for x in (part[:, :, rows, None], -part[:, :, None]))

    def check(self, batch: int, heads: int, num_queries: int, num_keys: int) -> None:
        fits = self.parameter.shape[0] in (1, batch) and self.parameter.shape[1] in (1, heads)
        if not fits or self.parameter.shape[2] != num_keys or num_queries > num_keys:
            raise ValueError(
                f"log_decay takes a gate for each key, (B, H, M) = {(batch, heads, num_keys)}, and queries that are"
                f" among them; got gates {tuple(self.parameter.shape)} and {num_queries} queries"
            )


def alibi(slopes: Tensor) -> Alibi:
    """Linear bias ``-slope_h * |distance|``, a slope per query head, of either sign.

    Press, Smith, Lewis, Train Short, Test Long: Attention with Linear Biases, arXiv 2108.12409.

    >>> alibi(torch.tensor([0.5, 0.25])).parameter.shape
    torch.Size([2])
    """
    if slopes.dim() != 1 or not slopes.is_floating_point():
        raise ValueError(f"alibi takes one float slope per head, (H,); got {slopes.dtype} {tuple(slopes.shape)}")
    return Alibi(slopes)


def alibi_slopes(heads: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """The geometric slopes of the ALiBi paper, (heads,); ask for float64 ones beside float64 queries.

    >>> alibi_slopes(4)
    tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """
    device = torch.get_default_device() if device is None else device
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=dtype, device=device) / heads)


def relative_table(table: Tensor, dims: tuple[int, ...] | None = None) -> RelativeTable:
    """Relative-position bias from a table (H, 2 R + 1) on a line or (H, 2 Ry + 1, 2 Rx + 1, ...) on a grid of ``dims``.

    Entry ``[h, dy + Ry, dx + Rx]`` is added where the query lies ``dy`` rows and ``dx`` columns after the key
    (Liu et al., Swin Transformer, arXiv 2103.14030); offsets beyond the table take its outermost entry.

    >>> relative_table(torch.zeros(3, 13, 13), dims=(7, 7)).reach
    (6, 6)
    """
    axes = table.dim() - 1
    if axes < 1 or any(side % 2 == 0 for side in table.shape[1:]):
        raise ValueError(f"a relative table is (H, odd side per axis); got {tuple(table.shape)}")
    if axes > 1 and (dims is None or len(dims) != axes):
        raise ValueError(f"a relative table over {axes} axes needs dims, the grid's {axes} sizes; got {dims}")
    reach = tuple(side // 2 for side in table.shape[1:])
    return RelativeTable(table.flatten(1), (dims or ()) if axes > 1 else (), reach)


def log_decay(log_gates: Tensor) -> LogDecay:
    """Forgetting attention: a key counts less by every forget gate after it; ``log_gates`` (B, H, M) are at most 0.

    Adds ``c_i - c_j`` to the logit of query i and key j, with c the running sums of the log gates: the gates of
    tokens j + 1 to i. B and H may be 1. Differentiable; patterns beside it may not see the future. While
    decoding, give the gates of all M keys.

    Lin et al., Forgetting Transformer: Softmax Attention with a Forget Gate, arXiv 2503.02130.

    >>> from foveate import attend, causal
    >>> q = k = torch.zeros(1, 1, 3, 4)
    >>> gates = torch.tensor([0.5, 0.5, 0.25]).log().view(1, 1, 3)
    >>> attend(q, k, torch.eye(3).view(1, 1, 3, 3), causal, bias=log_decay(gates))[0, 0, 2] * 11
    tensor([1., 2., 8.])

    Raises ValueError for gates of another shape, TypeError for what is no float tensor.
    """
    if not isinstance(log_gates, Tensor) or not log_gates.is_floating_point():
        raise TypeError(f"log_decay takes a float tensor (B, H, M) of log gates; got {type(log_gates).__name__}")
    if log_gates.dim() != 3:
        raise ValueError(f"log_decay takes log gates (B, H, M); got {tuple(log_gates.shape)}")
    return LogDecay(log_gates.double().cumsum(-1))  # cumsum(dtype=...) would sum up gradients in the dtype of the gates


def _check_heads(what: str, values: Tensor, heads: int) -> None:
    if values.shape[0] != heads:
        raise ValueError(f"{what} must have one entry for each of the {heads} query heads; got {values.shape[0]}")
