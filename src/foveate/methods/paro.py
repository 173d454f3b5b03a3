"""PAROAttention: each head's tokens by the order of axes that makes its weights blocks, which are few and rounded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from foveate.attention import attend
from foveate.catalogue.tiers import method
from foveate.methods.denoising import SteppedMethod
from foveate.methods.paro_blocks import attend_rounded
from foveate.methods.paro_plan import (
    ORDERS,
    LayerPlan,
    Statistics,
    best_orders,
    group_of,
    heaviest,
    places,
    statistics,
)
from foveate.mixers.core import CoreOptions
from foveate.mixers.dynamic_sparse.denoising import Clock
from foveate.mixers.dynamic_sparse.on_video import VideoCore
from foveate.patterns import Pattern, block_mask, full

if TYPE_CHECKING:
    from foveate.adapt.hf.layers import Layers


@dataclass(eq=False)
class Calibration:
    """What a layer has seen so far: what orders are chosen by, then sums of weights of the steps, then its plan."""

    plan: LayerPlan | None = None
    ready: bool = False
    seen: list[Tensor] = field(default_factory=list)  # (2, 6, H) of each map
    group: int | None = None
    sums: Tensor | None = None

    def close(self, density: float) -> None:
        """Choose the blocks of the group of steps whose sums were collected last."""
        assert self.plan is not None
        if self.sums is not None and self.group is not None:
            self.plan.masks[self.group] = heaviest(self.sums, density)
        self.group = self.sums = None


@dataclass(frozen=True, eq=False)
class PARO(VideoCore):
    """Blocks of weights fixed beforehand, in each head's own order of frames, rows and columns.

    The first two videos are seen whole. By the maps of the first each head is given one of six orders: the one in which
    most blocks are nearly zero (``sigma`` of their weights below ``epsilon``) and weights within blocks are even, where
    ``alpha`` weighs one against the other. By those of the second each step of the first half, and the second half
    together, is given the share ``density`` of the blocks of greatest sums. From then on nothing is chosen any more.
    With ``bits`` queries, keys, values and weights are rounded block by block (`foveate.methods.paro_blocks`). Blocks
    that hold text are all seen.

    >>> core = PARO((4, 3, 3), text=2, block=4, clock=Clock(steps=1), bits=None)
    >>> q = k = v = torch.randn(1, 2, 38, 8)
    >>> for _ in range(3):
    ...     core.clock.advance()
    ...     out = core(q, k, v)
    >>> core.calibration.plan.orders.shape, core.calibration.plan.masks[0].shape
    (torch.Size([2]), torch.Size([2, 9, 9]))
    """

    density: float = 0.3
    bits: int | None = 8
    block: int = 64
    alpha: float = 0.5
    epsilon: float = 1e-3
    sigma: float = 0.9
    clock: Clock = field(default_factory=Clock, kw_only=True)
    calibration: Calibration = field(default_factory=Calibration, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1 or not 0 <= self.alpha <= 1 or self.block < 1:
            raise ValueError(
                f"density is above 0 and at most 1, alpha from 0 to 1, a block a token at least; got {self.density},"
                f" {self.alpha} and {self.block}"
            )
        if self.bits is not None and not 2 <= self.bits <= 16:
            raise ValueError(f"bits are 2 to 16, or None for none rounded; got {self.bits}")

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, within: Pattern = full, **options: Unpack[CoreOptions]
    ) -> Tensor:
        given = within != full or options.get("bias") is not None or options.get("softcap") is not None
        if self.bits is not None and (given or options.get("weights", "softmax") != "softmax"):
            raise NotImplementedError(
                "rounded blocks are of a softmax that sees whole videos: pass bits=None beside masks and biases"
            )
        return super().__call__(q, k, v, within=within, **options)

    @torch.no_grad()
    def prepared(self, q: Tensor, k: Tensor, scale: float, within: Pattern = full) -> LayerPlan | None:
        """The plan; None in the videos that it is made by, into which this step is counted."""
        if not self.clock.step:
            raise ValueError("no step has begun: call clock.advance() before each pass, as the method's hook does")
        state = self.calibration
        if state.ready:
            return state.plan
        if self.clock.video > 1 and state.plan is None:
            dense, uneven = torch.stack(state.seen).mean(0)
            state.plan = LayerPlan(best_orders(dense, uneven, self.alpha))
            state.seen.clear()
        if self.clock.video == 1:
            state.seen.append(self._of_orders(q, k, scale, within))
        elif self.clock.video == 2:
            self._add(q, k, scale, within)
        else:
            state.close(self.density)
            state.ready = True
            return state.plan
        return None

    def _of_orders(self, q: Tensor, k: Tensor, scale: float, within: Pattern) -> Tensor:
        """Both measures of all orders, (2, 6, H)."""
        found = []
        for number in range(len(ORDERS)):
            measured = self._measured(torch.full((q.shape[1],), number), q, k, scale, within)
            found.append(torch.stack((measured.sparse, measured.uneven)))
        return torch.stack(found, 1)

    def _add(self, q: Tensor, k: Tensor, scale: float, within: Pattern) -> None:
        """Sums of weights of blocks, in the orders chosen, to those of the step's group."""
        state, group = self.calibration, group_of(self.clock.step, self.clock.steps)
        assert state.plan is not None
        if state.group != group:
            state.close(self.density)
            state.group = group
        sums = self._measured(state.plan.orders, q, k, scale, within).sums
        state.sums = sums if state.sums is None else state.sums + sums

    def _index(self, orders: Tensor, device: torch.device) -> Tensor:
        """Which token comes where, (H, N), text behind the video."""
        text = torch.arange(self.video.length, self.length, device="cpu").expand(len(orders), -1)
        return torch.cat((places(self.video, orders), text), 1).to(device)

    def _measured(self, orders: Tensor, q: Tensor, k: Tensor, scale: float, within: Pattern) -> Statistics:
        """Statistics of heads, each in its own order."""
        index, seen = self._index(orders, q.device), None
        if within != full:
            given = within.mask(self.length).to(q.device)
            seen = _taken(_taken(given.expand(-1, q.shape[1], -1, -1), index).mT, index).mT
        options: dict[str, Any] = {"scale": scale, "epsilon": self.epsilon, "sigma": self.sigma, "seen": seen}
        return statistics(_taken(q, index), _taken(k, index), self.video.length, self.block, **options)

    def table(self, plan: LayerPlan) -> Tensor:
        """Which blocks of all tokens, in the heads' orders, see which at this step, (H, R, R)."""
        group = group_of(self.clock.step, self.clock.steps)
        if group not in plan.masks:
            raise ValueError(f"step {self.clock.step} was not among those of the videos that calibrated this plan")
        of_video, text = (
            plan.masks[group],
            self.video.length // self.block,
        )  # the first block with text, if there is any
        blocks = -(-self.length // self.block)
        found = of_video.new_zeros(of_video.shape[0], blocks, blocks)
        found[:, : of_video.shape[1], : of_video.shape[2]] = of_video
        if self.text:
            found[:, text:] = True
            found[:, :, text:] = True
        return found

    def run(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        plan = self.prepared(q, k, scale)
        if plan is None:
            return attend(q, k, v, scale=scale)
        table = self.table(plan).unsqueeze(0).to(q.device)
        index = self._index(plan.orders, q.device)
        q, k, v = (_taken(x, index) for x in (q, k, v))
        if self.bits is None:
            out = attend(q, k, v, block_mask(table, self.block), scale=scale)
        else:
            out = attend_rounded(q, k, v, table, self.block, bits=self.bits, scale=scale)
        return _taken(out, index.argsort(1))

    def mask(self, q: Tensor, k: Tensor, v: Tensor, scale: float, within: Pattern = full) -> Tensor:
        plan = self.prepared(q, k, scale, within)
        if plan is None:
            return torch.ones(*q.shape[:2], self.length, self.length, dtype=torch.bool, device=q.device)
        block = (self._index(plan.orders, q.device).argsort(1) // self.block).unsqueeze(2)  # (H, N, 1)
        table = self.table(plan).to(q.device)
        rows = table.gather(1, block.expand(-1, -1, table.shape[2]))
        return rows.gather(2, block.mT.expand(-1, self.length, -1)).expand(q.shape[0], -1, -1, -1)


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """Heads (B, H, N, D) by an index (H, N)."""
    return x.gather(2, index[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3]))


@method(
    "paro_attention",
    papers=("PAROAttention",),
    tiny={"grid": (5, 3, 3), "block": 4, "density": 0.3, "bits": None, "steps": 1},
    full_budget={"density": 1.0},
    exempt={"neighbours": "all clips of the batch that calibrates it have a say in its plan"},
    uses=("video",),
)
def paro_attention(
    grid: tuple[int, int, int],
    *,
    text: int = 0,
    density: float = 0.3,
    bits: int | None = 8,
    block: int = 64,
    alpha: float = 0.5,
    epsilon: float = 1e-3,
    sigma: float = 0.9,
    steps: int = 50,
    passes: int = 1,
    plan: dict[int, LayerPlan] | None = None,
    layers: Layers | None = None,
    heads: Iterable[int] | None = None,
) -> SteppedMethod:
    """PAROAttention: tokens by the order of axes that makes a head's weights blocks, few of them, rounded by blocks.

    ``grid`` are the frames, rows and columns of the video's tokens, behind which there are ``text`` more. See `PARO`,
    and `foveate.methods.denoising.SteppedMethod` for ``steps`` and ``passes``. Two videos calibrate it, unless a
    ``plan`` of an earlier calibration is given (`plan_of`). The authors keep ``alpha`` to themselves, and their formula
    of the order contradicts its aim (`foveate.methods.paro_plan.best_orders`); integer kernels are emulated, so that
    ``bits`` cost time here. Heads that look along an axis gain by it; on the made-up ones of
    ``benchmarks/video_sparse.py``, which look for objects, orders of their own keep no more than that of frames does.

    Zhao et al., PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual
    Generation Models, arXiv 2506.16054.
    """

    def make(clock: Clock, number: int) -> PARO:
        known = None if plan is None else plan[number]
        options = (density, bits, block, alpha, epsilon, sigma)
        return PARO(grid, text, *options, clock=clock, calibration=Calibration(known, ready=known is not None))

    return SteppedMethod(make, steps, passes, layers, heads)


def plan_of(change: Any) -> dict[int, LayerPlan]:
    """The plans of the layers that `paro_attention` is at work in, to be given to it another time.

    Raises ValueError before two videos have calibrated it.
    """
    found = {}
    for number, swap in change.swaps.items():
        state = swap.core.calibration
        if not state.ready:
            raise ValueError(
                "two videos calibrate PAROAttention, and a third shows that they are over: run these first"
            )
        found[number] = state.plan
    return found
