"""MALA: linear attention whose weights depend on the magnitude of the query."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.catalogue.registry import register
from foveate.layers.masked_ops import TINY, hide
from foveate.layers.short_conv import ShortConv
from foveate.mixers.base import StepOutput, join_heads
from foveate.mixers.linear.gated_grid import GatedGridMixer
from foveate.patterns import Grid, Layout
from foveate.precision import accum_dtype, to_accum
from foveate.recurrence import recur


class Sums(NamedTuple):
    """Decoding state of MALA: sums of k v^T, k and (v, 1), the number of tokens seen, the convolution's tail."""

    products: Tensor  # (B, H, D, D)
    keys: Tensor  # (B, H, D, 1)
    values: Tensor  # (B, H, 1, D + 1)
    seen: int
    tail: Tensor


@register(
    "mala",
    papers=("MALA",),
    formula="o_i = Σ_j (β_i s_ij - γ_i) v_j, s_ij = φ(q_i)·φ(k_j) / N√d, S_i = Σ_j s_ij, β_i = 1 + 1/S_i, γ_i = S_i/N",
    supports={"causal", "noncausal", "padding", "grid", "decode"},
    notes=(
        "The 1/N√d inside s, the gate and the 5 x 5 convolution of the values are those of the authors' code. There "
        "queries and keys turn with their positions in s_ij but not in S_i, so that S stays positive; the weights "
        "sum to 1 exactly with rotary=None. Causal: sums, N included, run over the tokens so far."
    ),
)
class MagnitudeAwareLinearAttention(GatedGridMixer):
    """Linear attention whose weights grow sharper with the magnitude of the query, as softmax's do.

    Divided by their sum, linear weights do not depend on the query's length. Scaled and shifted instead, they still sum
    to 1, and their spread grows with it; they may be negative.

    On sequences it may be causal, and decodes with a state of fixed size. A grid has no causal form.
    """

    def check(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> None:
        super().check(x, context, layout, padding)
        if self.causal and isinstance(layout, Grid):
            raise ValueError(f"mala is causal on sequences only; got {layout}: build it with causal=False")

    def attention(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout | None, key_mask: Tensor | None) -> Tensor:
        out, *_ = self.sums(q, k, v, layout, key_mask)
        return out

    def sums(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout | None, key_mask: Tensor | None, state: Sums | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Heads out, and the sums over the keys so far."""
        first, past = (0, (None, None, None)) if state is None else (state.seen, state[:3])
        one = torch.ones_like(v[..., :1], dtype=k.dtype)
        values = torch.cat([to_accum(v), hide(one, key_mask)], dim=-1)
        turned = (self.turn(q, layout, first), self.turn(k, layout, first))
        runs = ((*turned, to_accum(v)), (q, k, one), (one, one, values))
        scales = (self.head_dim**-0.5, self.head_dim**-0.5, 1.0)
        products, keys, total = (
            recur(*run, scale=scale, state=before, causal=self.causal)
            for run, scale, before in zip(runs, scales, past, strict=True)
        )
        number = total.out[..., -1:].clamp_min(1)
        size = keys.out / number
        out = products.out / number * (1 + 1 / size.clamp_min(TINY)) - size * total.out[..., :-1] / number
        return out, products.state, keys.state, total.state

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        if not self.causal:
            return super().mix(x, context, layout, padding)
        return self.run(x, None, padding).out

    def empty_state(self, batch: int, capacity: int | None) -> Sums:
        assert isinstance(self.local, ShortConv)
        weight, heads, width = self.weight, self.heads, self.head_dim
        shapes = ((width, width), (width, 1), (1, width + 1))
        products, keys, values = (
            weight.new_zeros(batch, heads, *each, dtype=accum_dtype(weight.dtype)) for each in shapes
        )
        return Sums(products, keys, values, 0, weight.new_zeros(batch, *self.local.tail_shape))

    def mix_after(self, x: Tensor, state: Sums) -> StepOutput:
        return self.run(x, state, None)

    def run(self, x: Tensor, state: Sums | None, padding: Tensor | None) -> StepOutput:
        q, k, v = self.features(x)
        k, v = hide(k, padding), hide(v, padding)
        detail, tail = self.local(join_heads(v), None if state is None else state.tail)
        out, products, keys, values = self.sums(q, k, v, None, padding, state)
        seen = x.shape[1] + (0 if state is None else state.seen)
        return StepOutput(self.read_out(x, out, detail), Sums(products, keys, values, seen, tail))

    def state_bytes(self, n: int) -> int:
        state = self.init_state(1)
        return sum(part.numel() * part.element_size() for part in (*state[:3], state.tail))
