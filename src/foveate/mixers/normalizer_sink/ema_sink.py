"""EMA-Sink: streaming attention to a window, and to sinks into which all that left it is averaged."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.attention import attend
from foveate.cache.ema_sink import EMASinkCache
from foveate.catalogue.registry import register
from foveate.layers.rotary import rotate
from foveate.mixers.attention import AttentionMixer
from foveate.mixers.base import StepOutput, join_heads
from foveate.patterns import Layout


@register(
    "ema_sink_attention",
    papers=("Reward Forcing (EMA-Sink)",),
    formula="o_i = attention of q_i to (S, v_S) and the last w blocks, (S, v_S) ← α (S, v_S) + (1 - α) (k, v) evicted",
    supports={"causal", "decode", "gqa"},
)
class EMASinkAttention(AttentionMixer):
    """Attention of each block of tokens to itself, the blocks before it in a window, and sinks that average the rest.

    A block is what is made at once: the tokens of a video's next frames, which see one another, or one token of text.
    The first block fills the sinks; each block that leaves the window of ``window`` blocks is averaged into them, with
    a share of 1 - ``alpha``. Memory is constant in the length. ``rotary`` positions are counted in the cache. The whole
    sequence is computed block by block, as it streams.

    Lu et al., Reward Forcing, arXiv 2512.04678, with the α of the authors' published code.
    """

    tiny: ClassVar[dict[str, Any]] = {"window": 5, "alpha": 0.8}

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        window: int = 8,
        block: int = 1,
        alpha: float = 0.999,
        rotary: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, **options)
        self.empty = EMASinkCache(window=window, block=block, alpha=alpha)
        self.in_cache = rotary

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        return self.mix_after(x, self.empty).out

    def empty_state(self, batch: int, capacity: int | None) -> EMASinkCache:  # type: ignore[override]
        return self.empty

    def mix_after(self, x: Tensor, state: EMASinkCache) -> StepOutput:  # type: ignore[override]
        block, outs = self.empty.block, []
        if x.shape[1] % block:
            raise ValueError(f"tokens come in blocks of {block}, and {x.shape[1]} are not whole ones")
        q, k, v = self.project(x, x)
        for first in range(0, x.shape[1], block):
            part = slice(first, first + block)
            state = state.append(k[:, :, part], v[:, :, part])
            outs.append(attend(*self._turned(q[:, :, part], state.k), state.v))
        out = torch.cat(outs, 2) if outs else q
        return StepOutput(self.to_out(join_heads(out)), state)

    def _turned(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, the last of the cache, and its keys, at their places in it."""
        if self.in_cache is None:
            return q, k
        at = torch.arange(k.shape[2], device=k.device)
        return rotate(q, at[-q.shape[2] :], self.in_cache), rotate(k, at, self.in_cache)

    def state_bytes(self, n: int) -> int:
        kept = min(n, self.empty.block * (1 + self.empty.window))
        return 2 * kept * self.kv_heads * self.head_dim * self.weight.element_size()
