"""Mixers: tokens in, tokens out. Reading a prompt and decoding token by token equal ``forward`` over the sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from foveate.catalogue.budget import Budget
from foveate.catalogue.registry import Feature, Row
from foveate.layouts.place import NOWHERE, Place
from foveate.patterns import Grid, Layout, Packed, Pattern, causal, full, key_padding
from foveate.patterns.placed import merged
from foveate.patterns.rules.listed import place_of_lengths


class StepOutput(NamedTuple):
    """Tokens (B, N, C), and the decoding state after the last of them."""

    out: Tensor
    state: Any


class Mixer(nn.Module):
    """Base of all mixers: (B, N, C) to (B, N, C)."""

    row: ClassVar[Row]
    usual_supports: ClassVar[frozenset[Feature]] = frozenset()  # what rows of this kind support unless they say so
    tiny: ClassVar[dict[str, Any]] = {}  # options under which a few dozen tokens are already sparse
    full_budget: ClassVar[dict[str, Any] | None] = None  # options that make it plain attention, if any do
    spends: ClassVar[Budget | str | None] = None  # the option that says how much it spends
    grids: ClassVar[tuple[Layout, ...]] = ()  # layouts to test a grid mechanism on
    grid_axes: tuple[int, ...] = ()  # tokens live on a grid of as many axes, or of one of these; () for any layout
    one_by_one: ClassVar[bool] = False  # mixes documents of a pack, and sequences beside padding, one after the other
    exempt: ClassVar[dict[str, str]] = {}  # properties of the conformance suite it fails by design, with the reason

    def __init__(self, dim: int, *, causal: bool = True) -> None:
        super().__init__()
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim is the model's width, a positive whole number; got {dim!r}")
        feature = "causal" if causal else "noncausal"
        if feature not in self.row.supports:
            raise ValueError(f"{self.row.name} has no {feature} form")
        self.dim, self.causal = dim, causal

    def forward(
        self, x: Tensor, *, context: Tensor | None = None, layout: Layout | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """Mix tokens x (B, N, C), or read a ``context`` (B, M, C).

        ``layout`` says where the tokens live; ``padding`` (B, N or M) is True at real keys, and rows of x that are
        padding come out as zeros. What stands in padding, even NaN, changes nothing.
        """
        self.check(x, context, layout, padding)
        if self.one_by_one and context is None and (padding is not None or isinstance(layout, Packed)):
            return self._mix_one_by_one(x, layout, padding)
        if padding is None:
            return self.mix(x, context, layout, None)
        hidden = ~padding.unsqueeze(-1)
        if context is not None:
            return self.mix(x, context.masked_fill(hidden, 0), layout, padding)
        return self.mix(x.masked_fill(hidden, 0), None, layout, padding).masked_fill(hidden, 0)

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        """What a mechanism defines: forward on checked inputs."""
        raise NotImplementedError

    def _mix_one_by_one(self, x: Tensor, layout: Layout | None, padding: Tensor | None) -> Tensor:
        """Every document of every batch entry as if it were alone; padding as zeros."""
        out = torch.zeros_like(x)
        for document in _place(x.shape[1], layout, padding).documents:
            mixed = self.mix(x[document.batch, document.slots], None, None, None)
            out = out.to(mixed.dtype)
            out[document.batch, document.slots] = mixed
        return out

    # ---- decoding -------------------------------------------------------------------------------------------

    def init_state(self, batch: int, capacity: int | None = None) -> Any:
        """The decoding state before the first token of ``batch`` sequences.

        ``capacity`` is how many tokens to make room for at once, where each takes some; room for more is made as they
        come. A state is a value: whoever goes on from one twice gets two texts, neither of which disturbs the other.
        """
        if not self.causal or "decode" not in self.row.supports:
            unless = "" if self.causal else " unless causal"
            raise NotImplementedError(f"{self.row.name} does not decode token by token{unless}")
        return self.empty_state(batch, capacity)

    def prefill(self, x: Tensor, state: Any) -> StepOutput:
        """Mix the next tokens x (B, N, C), a prompt or a part of one, at the cost of ``forward``.

        The state after them is the one that :meth:`decode`, token by token, would have left.
        """
        self.check(x, None, None, None)
        return self.mix_after(x, state)

    def decode(self, x: Tensor, state: Any) -> StepOutput:
        """Mix one more token x (B, 1, C)."""
        if x.dim() != 3 or x.shape[1] != 1 or x.shape[2] != self.dim:
            raise ValueError(f"{self.row.name} decodes one token (batch, 1, {self.dim}); got {tuple(x.shape)}")
        return self.mix_after(x, state)

    def empty_state(self, batch: int, capacity: int | None) -> Any:
        """What a mechanism defines: the state before the first token."""
        raise NotImplementedError

    def mix_after(self, x: Tensor, state: Any) -> StepOutput:
        """What a mechanism defines: the next tokens x (B, N, C) after those that ``state`` has seen."""
        raise NotImplementedError

    # ---- costs and checks -----------------------------------------------------------------------------------

    def flops(self, n: int, layout: Layout | None = None) -> int:
        """Floating-point operations (a multiply-add is two) of forward on one sequence of n tokens, counted.

        Tokens lie on ``layout``, by default on the most nearly cubic grid where the mechanism lives on grids;
        :func:`foveate.mixers.costs.count_forward` says of which operators they are.
        """
        from foveate.mixers.costs import count_forward  # which counts mixers

        return count_forward(self, n, layout).flops

    def state_bytes(self, n: int) -> int:
        """Bytes a decoder keeps for one sequence after n tokens, at the parameters' precision.

        Counted on the state before the first token, which is right where it does not grow; numbers of tokens left out.
        """
        return sum(tensor.nbytes for tensor in tensors_of(self.empty_state(1, None)) if tensor.dtype != torch.long)

    def check(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> None:
        """Refuse inputs this mechanism does not support, in words."""
        name, supports = self.row.name, self.row.supports
        for what, tensor in (("x", x), ("context", context)):
            if tensor is not None and (tensor.dim() != 3 or tensor.shape[2] != self.dim):
                raise ValueError(f"{name} takes {what} (batch, length, {self.dim}); got {tuple(tensor.shape)}")
        if context is not None and ("cross" not in supports or self.causal):
            raise ValueError(f"{name} cannot read a context{' while causal' if 'cross' in supports else ''}")
        if self.grid_axes and (not isinstance(layout, Grid) or layout.num_axes not in self.grid_axes):
            axes = " or ".join(map(str, self.grid_axes))
            shape = "Grid(height, width)" if 2 in self.grid_axes else "Grid(time, height, width)"
            raise ValueError(f"{name} lives on a grid of {axes} axes: pass layout={shape}; got {layout}")
        for kind, feature in ((Grid, "grid"), (Packed, "packed")):
            if isinstance(layout, kind) and feature not in supports:
                raise ValueError(f"{name} does not take a {feature} layout; got {layout}")
        keys = x if context is None else context
        if layout is not None:
            layout.check(keys.shape[1])
            if layout.batches not in (1, keys.shape[0]):
                raise ValueError(f"{layout} is for a batch of {layout.batches}; got {tuple(keys.shape)}")
        if padding is not None and "padding" not in supports:
            raise ValueError(f"{name} does not take padding: pass sequences of one length")
        if padding is not None and (padding.dtype != torch.bool or padding.shape != keys.shape[:2]):
            raise ValueError(f"padding is boolean {tuple(keys.shape[:2])}; got {padding.dtype} {tuple(padding.shape)}")

    def within(self, padding: Tensor | None) -> Pattern:
        """What the call allows at most: causality and padding."""
        allowed = causal if self.causal else full
        if padding is None:
            return allowed
        return key_padding(padding) & allowed if self.causal else key_padding(padding)

    @property
    def weight(self) -> Tensor:
        """Any parameter: its dtype and device are the mixer's."""
        return next(self.parameters())


def _place(length: int, layout: Layout | None, padding: Tensor | None) -> Place:
    places = [place_of_lengths(layout.lengths, length)] if isinstance(layout, Packed) else []
    places += [] if padding is None else [Place.counted(torch.where(padding, 0, NOWHERE))]
    return merged(places)


def tensors_of(state: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, tuple):
        for part in state:
            yield from tensors_of(part)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H * D) to (B, H, N, D), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) to (B, N, H * D)."""
    return x.transpose(1, 2).flatten(2)


def key_heads(heads: int, kv_heads: int | None) -> int:
    """How many heads of keys and values serve so many query heads: as many by default."""
    if kv_heads and heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads; got {kv_heads} and {heads}")
    return kv_heads or heads


def divided(dim: int, heads: int) -> int:
    """Width of one head; refuses a width the heads do not divide."""
    if heads < 1 or dim % heads:
        raise ValueError(f"heads must divide dim: {dim} / {heads} is not whole; pass head_dim to choose another width")
    return dim // heads
