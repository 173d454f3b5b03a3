"""Mixers that are projections around a core, with a decoder that forgets what no later query can see."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from foveate.attention import Bias, Weights, attend
from foveate.attention.bias import Dense
from foveate.layers.rotary import rotate
from foveate.mixers.base import Mixer, Stepped, divided, join_heads, split_heads
from foveate.mixers.core import Core, PatternCore, joined
from foveate.patterns import Layout, Pattern, causal, key_padding, window
from foveate.patterns.algebra import Boxes, Interval

FARTHEST = 2**40  # a position beyond any sequence

JUMPS = {"differences": "outputs jump where a small move changes which keys are chosen"}


class KeyValues(NamedTuple):
    """Keys (B, G, M, D) and values (B, G, M, D) kept, their positions (M,), and the number of tokens seen."""

    k: Tensor
    v: Tensor
    positions: Tensor
    seen: int


class AttentionMixer(Mixer):
    """Query, key, value and output projections around a core; ``rotary`` is the base of rotary positions."""

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        core: Core | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary: float | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.rotary = rotary
        self.heads, self.kv_heads = heads, kv_heads or heads
        if heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads; got {kv_heads} and {heads}")
        self.head_dim = head_dim or divided(dim, heads)
        self.core: Core = core or PatternCore()
        self.to_q = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.to_k = nn.Linear(dim, self.kv_heads * self.head_dim, bias=False)
        self.to_v = nn.Linear(dim, self.kv_heads * self.head_dim, bias=False)
        self.to_out = nn.Linear(heads * self.head_dim, dim, bias=False)

    # ---- what a mechanism may override ----------------------------------------------------------------------

    def weights(self, num_keys: int) -> Weights | str:
        return "softmax"

    def bias(self) -> Bias | None:
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, within: Pattern, layout: Layout | None) -> Tensor:
        """Heads out (B, H, N, D) from heads in."""
        weights = self.weights(k.shape[2])
        return self.core(q, k, v, within=within, bias=self.bias(), weights=weights, layout=layout)

    # ---- forward and step -----------------------------------------------------------------------------------

    def heads_of(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, N, D), keys and values (B, G, M, D)."""
        q = split_heads(self.to_q(x), self.heads)
        return q, split_heads(self.to_k(context), self.kv_heads), split_heads(self.to_v(context), self.kv_heads)

    def project(self, x: Tensor, context: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Heads, turned to their positions if those are rotary; the first key sits at position ``first``."""
        q, k, v = self.heads_of(x, context)
        if self.rotary is not None:
            last = first + k.shape[2]
            q = rotate(q, torch.arange(last - q.shape[2], last, device=q.device), self.rotary)
            k = rotate(k, torch.arange(first, last, device=k.device), self.rotary)
        return q, k, v

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        q, k, v = self.project(x, x if context is None else context)
        return self.to_out(join_heads(self.attend(q, k, v, self.within(padding), layout)))

    def start(self, batch: int) -> KeyValues:
        if not self.causal or "decode" not in self.row.supports:
            unless = "" if self.causal else " unless causal"
            raise NotImplementedError(f"{self.row.name} does not decode token by token{unless}")
        empty = self.weight.new_empty(batch, self.kv_heads, 0, self.head_dim)
        return KeyValues(empty, empty, torch.empty(0, dtype=torch.long, device=empty.device), 0)

    def step(self, x: Tensor, state: KeyValues) -> Stepped:
        q, k, v = self.project(x, x, state.seen)
        k, v = torch.cat([state.k, k], dim=2), torch.cat([state.v, v], dim=2)
        now = torch.tensor([state.seen], device=x.device)
        state = KeyValues(k, v, torch.cat([state.positions, now]), state.seen + 1)
        out = self.to_out(join_heads(self.attend_one(q, state)))
        return Stepped(out, self.forget(state))

    def attend_one(self, q: Tensor, state: KeyValues) -> Tensor:
        """One query (B, H, 1, D) against what is kept."""
        if self.static_pattern is None:
            return self.attend(q, state.k, state.v, causal, None)
        now = torch.tensor([[state.seen - 1]], device=q.device)
        pattern = joined(self.static_pattern, causal)
        head = torch.arange(pattern.heads, device=q.device).view(-1, 1)
        seen = pattern.visible(0, head, now, state.positions).expand(pattern.heads, -1)
        bias = self.bias()
        if bias is not None:
            heads = torch.arange(self.heads, device=q.device).view(1, -1, 1, 1)
            bias = Dense(bias.values(0, heads, now, state.positions.view(1, 1, 1, -1)))
        weights = self.weights(state.seen)
        return attend(q, state.k, state.v, key_padding(seen.unsqueeze(0)), bias=bias, weights=weights)

    def forget(self, state: KeyValues) -> KeyValues:
        """Drop the keys that no later query can see."""
        if self.static_pattern is None:
            return state
        keep = seen_later(self.static_pattern, state.positions, state.seen)
        return KeyValues(state.k[:, :, keep], state.v[:, :, keep], state.positions[keep], state.seen)

    @property
    def static_pattern(self) -> Pattern | None:
        """The core's pattern, where it is all the core does and positions alone decide it."""
        if not isinstance(self.core, PatternCore) or self.core.pattern.is_dynamic or self.core.pattern.needs_axes:
            return None
        return self.core.pattern

    # ---- costs ----------------------------------------------------------------------------------------------

    def state_bytes(self, n: int) -> int:
        kept = n
        if self.static_pattern is not None:
            kept = int(seen_later(self.static_pattern, torch.arange(n), n).sum())
        return 2 * kept * self.kv_heads * self.head_dim * self.weight.element_size()


def seen_later(pattern: Pattern, positions: Tensor, now: int) -> Tensor:
    """Which keys some query at position ``now`` or later may see (by any head): what a decoder must keep."""
    keep = torch.zeros_like(positions, dtype=torch.bool)
    first, last = torch.full_like(positions, now), torch.full_like(positions, FARTHEST)
    for head in range(pattern.heads):
        boxes = Boxes(
            torch.zeros_like(positions),
            torch.full_like(positions, head),
            Interval(first, last, positions, positions),
        )
        keep |= pattern.bounds(boxes).some
    return keep


def recent(size: int) -> Pattern:
    """The last ``size`` keys up to the query, itself included.

    >>> recent(2).mask(3)[0, 0].int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 1, 1]], dtype=torch.int32)
    """
    if size < 1:
        raise ValueError(f"a window holds at least the query's own key; got {size}")
    return window(size - 1, 0)
