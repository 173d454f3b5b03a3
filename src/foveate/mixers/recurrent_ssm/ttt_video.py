"""Test-time training beside local attention: a state carried from segment to segment of a video."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.catalogue.registry import register
from foveate.mixers.base import Mixer
from foveate.mixers.exact_io.flash_attention import FlashAttention
from foveate.mixers.recurrent_ssm.ttt import TTTMLP
from foveate.patterns import Layout, blocks


@register(
    "ttt_video",
    papers=("TTT-Video",),
    formula=(
        "a = attention within segments, z = a + tanh(α) ⊙ ttt(a), "
        "o = z + tanh(β) ⊙ reverse(ttt(reverse(z))), ttt as ttt_mlp"
    ),
    supports={"noncausal", "grid"},
    notes=(
        "Segments are equal stretches of the tokens as they lie, frame after frame; the overlap of three-second "
        "segments by their text in the paper is left to the model."
    ),
)
class TTTVideo(Mixer):
    """Attention within segments, and a TTT-MLP over all of them, forwards and backwards, each let in by a gate.

    ``segment`` is the number of tokens that attend to one another; other options are those of the TTT-MLP, whose
    parameters both directions share. ``attention`` is any mixer of (B, N, C) in the place of attention to
    segments, as in a pretrained model.
    """

    tiny: ClassVar[dict[str, Any]] = {"segment": 12, "mini_batch": 5}

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        segment: int = 1024,
        gate: float = 0.1,
        attention: Mixer | None = None,
        causal: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.attention = attention or FlashAttention(dim, heads, pattern=blocks(segment), causal=False)
        self.ttt = TTTMLP(dim, heads, **options)
        self.forwards, self.backwards = (nn.Parameter(torch.full((dim,), gate)) for _ in range(2))

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        near = self.attention(x, layout=layout)
        ahead = near + torch.tanh(self.forwards) * self.ttt(near)
        return ahead + torch.tanh(self.backwards) * self.ttt(ahead.flip(1)).flip(1)
