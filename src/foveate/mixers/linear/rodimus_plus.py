"""Rodimus+: Rodimus, then sliding windows whose heads share one key."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Unpack

from torch import Tensor, nn

from foveate.cache import KVCache
from foveate.catalogue.registry import register
from foveate.mixers.base import Mixer, StepOutput
from foveate.mixers.linear.rodimus import Rodimus, RodimusOptions
from foveate.mixers.linear.shared_key_window import SharedKeyWindow
from foveate.mixers.recurrent import RecurrentState
from foveate.patterns import Layout


class PlusState(NamedTuple):
    """The recurrence's state and the window's keys and values."""

    recurrent: RecurrentState
    cache: KVCache


@register(
    "rodimus_plus",
    papers=("Rodimus / Rodimus+",),
    formula="o = r + SW-SKA(norm(x + r)), r = Rodimus(x)",
    supports={"causal", "padding", "packed", "decode"},
    notes=(
        "Both token mixers of a Rodimus+ layer, without the feed-forward layer behind them. Padding lies at the ends "
        "of a sequence: inside it, the short convolution would read it as zeros."
    ),
)
class RodimusPlus(Mixer):
    """Rodimus for all of the past, then shared-key attention to the last ``window`` tokens, at constant memory."""

    tiny: ClassVar[dict[str, Any]] = {"window": 6, "memory": 8}

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        window: int = 1024,
        rotary: float | None = 10_000.0,
        causal: bool = True,
        **rodimus: Unpack[RodimusOptions],
    ) -> None:
        super().__init__(dim, causal=causal)
        self.recurrent = Rodimus(dim, **rodimus)
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.window = SharedKeyWindow(dim, heads, window=window, rotary=rotary)

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        said = self.recurrent(x, layout=layout, padding=padding)
        return said + self.window(self.norm(x + said), layout=layout, padding=padding)

    def empty_state(self, batch: int, capacity: int | None) -> PlusState:
        return PlusState(self.recurrent.init_state(batch), self.window.init_state(batch, capacity))

    def mix_after(self, x: Tensor, state: PlusState) -> StepOutput:
        said, recurrent = self.recurrent.mix_after(x, state.recurrent)
        near, cache = self.window.mix_after(self.norm(x + said), state.cache)
        return StepOutput(said + near, PlusState(recurrent, cache))

    def state_bytes(self, n: int) -> int:
        return self.recurrent.state_bytes(n) + self.window.state_bytes(n)
