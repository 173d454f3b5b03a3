"""A gated block around several selective scans, each along an order of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn.functional import silu

from foveate.layouts.orders import (
    Order,
    scan_orders,
)
from foveate.mixers.base import Mixer
from foveate.mixers.recurrent_ssm.mamba import Branch
from foveate.mixers.stateful import Lengths, laid_end_to_end
from foveate.patterns import Grid, Layout
from foveate.patterns import Sequence as Line


class ScanMixer(Mixer):
    """A gated block around several passes over the tokens, each along an order of its own, which are added.

    A mechanism says which ``orders`` its ``passes`` take and what a pass is, by default a convolution and a scan; it
    may change the channels ``before`` they are scanned and what the passes say ``after``, and leave the ``gate`` out.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 2,
        state: int = 16,
        conv: int = 4,
        rank: int | None = None,
        passes: int = 2,
        gate: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        if expand < 1:
            raise ValueError(f"expand is how many times the width is scanned, at least once; got {expand}")
        self.inner = expand * dim
        self.to_in = nn.Linear(dim, (1 + gate) * self.inner, bias=False)
        self.to_out = nn.Linear(self.inner, dim, bias=False)
        sizes = {"state": state, "conv": conv, "rank": rank or -(-dim // 16)}
        self.passes = nn.ModuleList(self.one_pass(**sizes) for _ in range(passes))

    def one_pass(self, *, state: int, conv: int, rank: int) -> nn.Module:
        """What scans ``inner`` channels along one order."""
        return Branch(self.inner, state=state, conv=conv, rank=rank)

    def orders(self, layout: Layout) -> Sequence[Order]:
        """The order of each pass, for tokens that live on ``layout``."""
        raise NotImplementedError

    def before(self, u: Tensor, layout: Layout) -> Tensor:
        return u

    def after(self, y: Tensor) -> Tensor:
        return y

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        flat, key_mask, lengths = laid_end_to_end(x, padding, layout)
        place = layout if isinstance(layout, Grid) else Line(flat.shape[1])
        u, *gate = self.to_in(flat).split(self.inner, dim=-1)
        y = self.after(self.scanned(self.before(u, place), place, lengths, key_mask))
        return self.to_out(y * silu(gate[0]) if gate else y).reshape(x.shape)

    def scanned(self, u: Tensor, place: Layout, lengths: Lengths, key_mask: Tensor | None) -> Tensor:
        """The sum of all passes over u (B, N, channels)."""
        orders = self.orders(place)
        runs = [
            partial(self.walk, each, order, lengths, key_mask) for each, order in zip(self.passes, orders, strict=True)
        ]
        return scan_orders(runs, u, orders)

    def walk(self, run: nn.Module, order: Order, lengths: Lengths, key_mask: Tensor | None, u: Tensor) -> Tensor:
        """One pass over u, which is in that order already; packed documents are walked in their own order."""
        backwards = lengths is not None and not order.is_identity
        lengths = lengths[::-1] if lengths is not None and backwards else lengths
        return run(u, lengths=lengths, key_mask=None if key_mask is None else order.apply(key_mask)).out
