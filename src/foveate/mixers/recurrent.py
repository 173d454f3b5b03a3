"""Mixers that carry a state from token to token: projections and gates around the recurrence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import silu

from foveate.layers.short_conv import ShortConv
from foveate.mixers.base import Mixer, StepOutput, divided, join_heads, split_heads
from foveate.patterns import Layout, Packed
from foveate.precision import accum_dtype
from foveate.recurrence import Recurrent, recur, step

Lengths = Sequence[int] | None


@dataclass(frozen=True, eq=False)
class Inputs:
    """What ``recur`` takes: q (B, H, N, D), k (B, G, M, D), v (B, G, M, Dv), and how the state fades and is turned."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None = None
    beta: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    bonus: Tensor | None = None
    scale: float | None = None

    def mask_padding(self, key_mask: Tensor) -> Inputs:
        """These inputs with tokens outside ``real`` (B, M) neither writing to the state nor fading it."""
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


class RecurrentMixer(Mixer):
    """Query, key, value and output projections around ``recur``; a mechanism adds features, gates and norms.

    ``head_dim`` is the width of queries and keys (dim / heads by default), ``value_dim`` that of values
    (head_dim by default). ``conv``, where not 0, is the width of short convolutions, followed by SiLU, on
    queries, keys and values.
    """

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
        self.heads, self.kv_heads = heads, kv_heads or heads
        if heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads; got {kv_heads} and {heads}")
        self.head_dim = head_dim or divided(dim, heads)
        self.value_dim = value_dim or self.head_dim
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
        """(B, N, C) from what the state said (B, H, N, Dv)."""
        return self.to_out(join_heads(heads))

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """States, keys and values of the recurrence, (S, D, Dv)."""
        return self.kv_heads, self.head_dim, self.value_dim

    @property
    def tail_shapes(self) -> list[tuple[int, int]]:
        """Channels and tokens that each convolution keeps."""
        return [conv.tail_shape for conv in self.convs if isinstance(conv, ShortConv)]

    # ---- forward, and the same with a state in hand ----------------------------------------------------

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        if not isinstance(layout, Packed) or x.shape[0] == 0:
            return self.read(x, x if context is None else context, None, padding)
        if context is not None:
            raise ValueError(f"{self.row.name} reads a context as a whole: it takes no packed layout beside it")
        lengths = layout.lengths * x.shape[0]  # the batch laid end to end is one longer pack
        flat = x.flatten(0, 1).unsqueeze(0)
        padding = None if padding is None else padding.reshape(1, -1)
        return self.read(flat, flat, lengths or None, padding).view(x.shape)

    def read(self, x: Tensor, context: Tensor, lengths: Lengths, padding: Tensor | None) -> Tensor:
        if padding is not None and context is x:
            x = context = x.masked_fill(~padding.unsqueeze(-1), 0)  # a convolution would read on
        return self.flow(x, context, None, lengths, padding).out

    def flow(
        self,
        x: Tensor,
        context: Tensor,
        state: RecurrentState | None = None,
        lengths: Lengths = None,
        padding: Tensor | None = None,
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

    def empty_state(self, batch: int, capacity: int | None) -> RecurrentState:
        weight = self.weight
        state = weight.new_zeros(batch, *self.state_shape, dtype=accum_dtype(weight.dtype))
        return RecurrentState(state, tuple(weight.new_zeros(batch, *shape) for shape in self.tail_shapes))

    def mix_after(self, x: Tensor, state: RecurrentState) -> StepOutput:
        return self.flow(x, x, state)

    def run(self, inputs: Inputs, *, lengths: Lengths = None, state: Tensor | None = None) -> Recurrent:
        """The recurrence itself, of documents of these ``lengths`` or after an earlier ``state``."""
        if state is not None and inputs.q.shape[2] == 1:
            return step(**vars(inputs), state=state)
        return recur(**vars(inputs), lengths=lengths, state=state, causal=self.causal)

    # ---- costs -----------------------------------------------------------------------------------------

    def state_bytes(self, n: int) -> int:
        tails = sum(math.prod(shape) for shape in self.tail_shapes)
        state_size, tail_size = accum_dtype(self.weight.dtype).itemsize, self.weight.element_size()
        return math.prod(self.state_shape) * state_size + tails * tail_size
