"""Mixers that carry a state from token to token: projections and gates around the recurrence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate.catalogue.registry import Feature
from foveate.layers.short_conv import ShortConv
from foveate.mixers.base import Mixer, StepOutput, divided, join_heads, key_heads, split_heads
from foveate.mixers.stateful import Lengths, laid_end_to_end
from foveate.patterns import Layout, Packed
from foveate.recurrence import Recurrent, recur, step


@dataclass(frozen=True, eq=False)
class Inputs:
    """What ``recur`` takes: q (B, H, N, D), k (B, G, M, D), v (B, G, M, Dv), and how the state decays and is turned."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None = None
    beta: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    bonus: Tensor | None = None
    scale: float | None = None

    def mask_padding(self, key_mask: Tensor) -> Inputs:
        """These inputs with tokens outside ``key_mask`` (B, M) neither writing to the state nor decaying it."""
        hidden = ~key_mask[:, None, :]  # (B, 1, M)
        k, v = (x.masked_fill(hidden.unsqueeze(-1), 0) for x in (self.k, self.v))
        decay = self.decay
        if decay is not None:
            if decay.dim() == 1:
                decay = decay[None, :, None].expand(key_mask.shape[0], -1, key_mask.shape[1])
            decay = decay.masked_fill(hidden if decay.dim() == 3 else hidden.unsqueeze(-1), 0)
        low_rank = self.low_rank
        if low_rank is not None:
            low_rank = low_rank[0], low_rank[1].masked_fill(hidden.unsqueeze(-1), 0)
        return replace(self, k=k, v=v, decay=decay, low_rank=low_rank)


class RecurrentState(NamedTuple):
    """The recurrence's state, (B, S, D, Dv), and the tails of q's, k's and v's convolutions."""

    recurrent: Tensor
    tails: tuple[Tensor, ...]


class Projected(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    tails: tuple[Tensor, ...]


class HeadOptions(TypedDict, total=False):
    """Options of :class:`RecurrentMixer` that mechanisms pass on to it."""

    kv_heads: int | None
    head_dim: int | None
    value_dim: int | None
    causal: bool


class RecurOptions(HeadOptions, total=False):
    """The same of those that leave the width of convolutions to users."""

    conv: int


Widths = Callable[[int, int, int | None, int | None], tuple[int, int]]


def equal_widths(dim: int, heads: int, head_dim: int | None, value_dim: int | None) -> tuple[int, int]:
    """Widths of a head's keys and values: dim / heads, and as many, where they are not given."""
    head_dim = head_dim or divided(dim, heads)
    return head_dim, value_dim or head_dim


def wide_values(dim: int, heads: int, head_dim: int | None, value_dim: int | None) -> tuple[int, int]:
    """The same with keys of dim / heads channels, and values twice as wide as keys."""
    head_dim = head_dim or divided(dim, heads)
    return head_dim, value_dim or 2 * head_dim


def narrow_keys(dim: int, heads: int, head_dim: int | None, value_dim: int | None) -> tuple[int, int]:
    """The same with values of dim / heads channels, and keys half as wide as values."""
    value_dim = value_dim or divided(dim, heads)
    return head_dim or max(1, value_dim // 2), value_dim


class RecurrentMixer(Mixer):
    """Query, key, value and output projections around ``recur``; a mechanism adds features, gates and norms.

    ``head_dim`` is the width of queries and keys, ``value_dim`` that of values; ``widths`` says what they are by
    default. ``conv``, where not 0, is the width of short convolutions, followed by SiLU, on queries, keys and values.
    """

    usual_supports: ClassVar[frozenset[Feature]] = frozenset({"causal", "padding", "packed", "decode", "gqa"})
    widths: ClassVar[Widths] = equal_widths

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        causal: bool = True,
        conv: int = 0,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, self.kv_heads = heads, key_heads(heads, kv_heads)
        self.head_dim, self.value_dim = type(self).widths(dim, heads, head_dim, value_dim)
        self.to_q = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.to_k = nn.Linear(dim, self.kv_heads * self.head_dim, bias=False)
        self.to_v = nn.Linear(dim, self.kv_heads * self.value_dim, bias=False)
        self.to_out = nn.Linear(heads * self.value_dim, dim, bias=False)
        widths = (layer.out_features for layer in (self.to_q, self.to_k, self.to_v))
        self.convs = nn.ModuleList(ShortConv(width, conv) for width in widths if conv)

    # ---- what a mechanism defines ----------------------------------------------------------------------

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        """The recurrence's inputs from the tokens x (B, N, C) and the projected heads (B, H, N, D)."""
        return Inputs(q, k, v)

    def read_out(self, x: Tensor, heads: Tensor) -> Tensor:
        """(B, N, C) from the outputs of the recurrence (B, H, N, Dv)."""
        return self.to_out(join_heads(heads))

    # ---- forward, and the same with a state in hand ----------------------------------------------------

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        if context is not None:
            if isinstance(layout, Packed):
                raise ValueError(f"{self.row.name} reads a context as a whole: it takes no packed layout beside it")
            return self.flow(x, context, None, None, padding).out
        flat, key_mask, lengths = laid_end_to_end(x, padding, layout)
        return self.flow(flat, flat, None, lengths, key_mask).out.reshape(x.shape)

    def flow(
        self, x: Tensor, context: Tensor, state: Any = None, lengths: Lengths = None, padding: Tensor | None = None
    ) -> StepOutput:
        """All that happens to tokens whose padding is zeros, with the state after the last of them."""
        q, k, v, tails = self.project(x, context, () if state is None else state.tails, lengths)
        inputs = self.inputs(x, q, k, v)
        if padding is not None:
            inputs = inputs.mask_padding(padding)
        out, recurrent = self.run(inputs, lengths=lengths, state=None if state is None else state.recurrent)
        return StepOutput(self.read_out(x, out), RecurrentState(recurrent, tails))

    def project(self, x: Tensor, context: Tensor, tails: tuple[Tensor, ...], lengths: Lengths = None) -> Projected:
        """Heads of queries, keys and values, and the tails of their convolutions."""
        flat = [self.to_q(x), self.to_k(context), self.to_v(context)]
        if self.convs:
            past = tails or (None, None, None)
            convolved = [conv(y, tail, lengths) for conv, y, tail in zip(self.convs, flat, past, strict=True)]
            flat, tails = [silu(each.out) for each in convolved], tuple(each.tail for each in convolved)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (split_heads(y, number) for y, number in zip(flat, heads, strict=True))
        return Projected(q, k, v, tails)

    @torch.no_grad()
    def empty_state(self, batch: int, capacity: int | None) -> Any:
        nothing = self.weight.new_zeros(batch, 0, self.dim)
        return self.flow(nothing, nothing).state  # what no tokens leave

    def mix_after(self, x: Tensor, state: RecurrentState) -> StepOutput:
        return self.flow(x, x, state)

    def run(self, inputs: Inputs, *, lengths: Lengths = None, state: Tensor | None = None) -> Recurrent:
        """The recurrence itself, of documents of these ``lengths`` or after an earlier ``state``."""
        if state is not None and inputs.q.shape[2] == 1:
            return step(**vars(inputs), state=state)
        return recur(**vars(inputs), lengths=lengths, state=state, causal=self.causal)
