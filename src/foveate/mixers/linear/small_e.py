"""A speech decoder that reads a text: gated linear attention, and cross-attention that knows how far it has read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveate.attention import attend
from foveate.catalogue.registry import register
from foveate.mixers.base import Mixer, StepOutput
from foveate.mixers.linear.gla import GLA
from foveate.mixers.recurrent import RecurrentState
from foveate.patterns import Layout, key_padding


class Text(NamedTuple):
    """What a decoder keeps of a text: keys and values (B, M, A), and which of its M tokens are real (B, M)."""

    k: Tensor
    v: Tensor
    key_mask: Tensor


class Reading(NamedTuple):
    """The decoder's state, that of the tracker of positions, and the text."""

    decoder: RecurrentState
    tracker: RecurrentState
    text: Text


@register(
    "small_e",
    papers=("Small-E",),
    formula="y = GLA(x), p = attend(W_q (x + y), W_k t, e), o = y + W attend(p + GLA(p), e, W_v t), e: positions",
    supports={"causal", "padding", "decode"},
    notes=(
        "The text t is passed as text=; without one a learned stand-in of four tokens is read. One head looks at the "
        "text, as in the authors' code. The cross-attention is aware of positions, not forced to move forward."
    ),
)
class SmallE(Mixer):
    """Gated linear attention over speech, and cross-attention to a text by way of positions in the text.

    A first look, by content, gathers the positions of the text tokens that fit; a recurrence over these positions
    tracks the reading; a second look, by position alone, fetches what stands there.

    >>> mixer = SmallE(64, heads=4)
    >>> text = torch.randn(2, 9, 64)
    >>> mixer(torch.randn(2, 50, 64), text=text).shape
    torch.Size([2, 50, 64])
    >>> out, state = mixer.prefill(torch.randn(2, 7, 64), mixer.init_state(2, text=text))
    """

    def __init__(self, dim: int, heads: int = 8, *, positions: int = 64, causal: bool = True, **gla: Any) -> None:
        super().__init__(dim, causal=causal)
        if positions < 2 or positions % 2:
            raise ValueError(f"positions is the even width of position features; got {positions}")
        self.positions = positions
        self.decoder = GLA(dim, heads, **gla)
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.to_q, self.to_k, self.to_v = (nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim)) for _ in range(3))
        self.tracker = GLA(positions, 1)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.stand_in = nn.Parameter(torch.randn(1, 4, dim))

    def forward(
        self,
        x: Tensor,
        *,
        text: Tensor | None = None,
        text_padding: Tensor | None = None,
        context: Tensor | None = None,
        layout: Layout | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Mix speech x (B, N, C) under a ``text`` (B, M, C); ``text_padding`` (B, M) is True at real tokens."""
        self.check(x, context, layout, padding)
        hidden = None if padding is None else ~padding.unsqueeze(-1)
        x = x if hidden is None else x.masked_fill(hidden, 0)
        said = self.decoder(x, padding=padding)
        text_read = self.prepared(text, text_padding, x.shape[0])
        seen = self.look(x + said, text_read)
        out = said + self.fetch(seen + self.tracker(seen, padding=padding), text_read)
        return out if hidden is None else out.masked_fill(hidden, 0)

    def look(self, x: Tensor, text: Text) -> Tensor:
        """Positions of the text tokens that fit x (B, N, C) by content, as features (B, N, P)."""
        places = self.places(text).expand(x.shape[0], -1, -1)
        return one_head(self.to_q(self.norm(x)), text.k, places, text.key_mask)

    def fetch(self, seen: Tensor, text: Text) -> Tensor:
        """What stands at the positions that ``seen`` (B, N, P) points to, (B, N, C)."""
        places = self.places(text).expand(seen.shape[0], -1, -1)
        return self.to_out(one_head(seen, places, text.v, text.key_mask))

    def places(self, text: Text) -> Tensor:
        return sinusoids(text.k.shape[1], self.positions).to(text.k).unsqueeze(0)

    def prepared(self, text: Tensor | None, key_mask: Tensor | None, batch: int) -> Text:
        """Keys and values of a text, or of the stand-in for one."""
        if text is None:
            text, key_mask = self.stand_in.expand(batch, -1, -1), None
        if text.dim() != 3 or text.shape[0] != batch or text.shape[2] != self.dim:
            raise ValueError(f"text is (batch, length, dim) = ({batch}, M, {self.dim}); got {tuple(text.shape)}")
        if key_mask is None:
            key_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        if key_mask.dtype != torch.bool or key_mask.shape != text.shape[:2]:
            raise ValueError(
                f"text_padding is boolean {tuple(text.shape[:2])}; got {key_mask.dtype} {tuple(key_mask.shape)}"
            )
        text = text.masked_fill(~key_mask.unsqueeze(-1), 0)
        return Text(self.to_k(text), self.to_v(text), key_mask)

    def init_state(
        self, batch: int, capacity: int | None = None, *, text: Tensor | None = None, text_padding: Tensor | None = None
    ) -> Reading:
        """The decoding state before the first token, for ``text`` (B, M, C)."""
        state = super().init_state(batch, capacity)
        return state if text is None else state._replace(text=self.prepared(text, text_padding, batch))

    def empty_state(self, batch: int, capacity: int | None) -> Reading:
        text = self.prepared(None, None, batch)
        return Reading(self.decoder.init_state(batch), self.tracker.init_state(batch), text)

    def mix_after(self, x: Tensor, state: Reading) -> StepOutput:
        said, decoder = self.decoder.mix_after(x, state.decoder)
        seen = self.look(x + said, state.text)
        tracked, tracker = self.tracker.mix_after(seen, state.tracker)
        return StepOutput(said + self.fetch(seen + tracked, state.text), Reading(decoder, tracker, state.text))

    def state_bytes(self, n: int, text_length: int = 4) -> int:
        """Bytes kept after n tokens: two states of fixed size, and the text's keys and values."""
        text = 2 * text_length * self.dim * self.weight.element_size()
        return self.decoder.state_bytes(n) + self.tracker.state_bytes(n) + text


def one_head(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
    """Softmax attention of q (B, N, D) to those in ``key_mask`` (B, M) among k (B, M, D) and v (B, M, Dv)."""
    return attend(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), key_padding(key_mask)).squeeze(1)


def sinusoids(length: int, width: int) -> Tensor:
    """Position features (length, width) in float64: sines and cosines at wavelengths from 2 pi to 20000 pi.

    Vaswani et al., Attention Is All You Need, arXiv 1706.03762.

    >>> sinusoids(2, 4).float()
    tensor([[0.0000, 0.0000, 1.0000, 1.0000],
            [0.8415, 0.0100, 0.5403, 0.9999]])
    """
    places, channels = (torch.arange(*span, dtype=torch.float64, device="cpu") for span in ((length,), (0, width, 2)))
    angles = places[:, None] * 10_000.0 ** (-channels / width)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
