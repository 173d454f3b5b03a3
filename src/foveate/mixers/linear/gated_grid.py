"""Linear attention over whole images, with rotary positions, a local convolution of the values and a gate."""

from __future__ import annotations

from torch import Tensor, nn

from foveate.layers.grid_rotary import rotate_on
from foveate.layers.local_conv import LocalConv
from foveate.layers.masked_ops import hide
from foveate.layers.short_conv import ShortConv
from foveate.mixers.base import Mixer, divided, join_heads, split_heads
from foveate.mixers.linear.linear_transformer import elu_plus_one
from foveate.patterns import Layout
from foveate.precision import to_accum


class GatedGridMixer(Mixer):
    """out = W (attention(q, k, v) + convolution(v)) * gate(x), on images and on sequences.

    ``rotary`` is the base of rotary positions, None for none; ``local`` the width of the convolution ("LePE") and
    ``axes`` the number of axes it spans. A sequence is an image of one row.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        rotary: float | None = 10_000.0,
        local: int = 5,
        axes: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, self.head_dim, self.rotary = heads, divided(dim, heads), rotary
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_gate = nn.Linear(dim, dim)
        self.to_out = nn.Linear(dim, dim)
        self.local: nn.Module = ShortConv(dim, local) if causal else LocalConv(dim, local, axes=axes)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout | None, key_mask: Tensor | None) -> Tensor:
        """Heads out (B, H, N, D) of positive features q and k, in float32 at least, and values v."""
        raise NotImplementedError

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        q, k, v = self.features(x)
        k, v = hide(k, padding), hide(v, padding)
        out = self.attention(q, k, v, layout, padding)
        return self.read_out(x, out, self.local(join_heads(v), layout))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split_heads(self.to_qkv(x), 3 * self.heads).chunk(3, 1)
        return elu_plus_one(to_accum(q)), elu_plus_one(to_accum(k)), v

    def read_out(self, x: Tensor, heads: Tensor, detail: Tensor) -> Tensor:
        return self.to_out((join_heads(heads).to(x.dtype) + detail) * self.to_gate(x))

    def turn(self, x: Tensor, layout: Layout | None, first: int = 0) -> Tensor:
        return x if self.rotary is None else rotate_on(x, layout, self.rotary, first=first)
