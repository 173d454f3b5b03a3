"""A decoder whose layers differ in what they see, in their positions and in the scale of logits; SWAN-GPT, GEB."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate.catalogue.tiers import Preset, model
from foveate.mixers.attention import recent
from foveate.mixers.base import StepOutput
from foveate.mixers.exact_io.flash_attention import FlashAttention
from foveate.patterns import full


class LayerKind(NamedTuple):
    """One layer's switches.

    ``window`` is how many keys a query sees, None for all before it; ``rotary`` the base of rotary positions, None for
    no positions; ``trained`` the length from which on logits are scaled with the logarithm of a query's position.
    """

    window: int | None = None
    rotary: float | None = 10_000.0
    trained: int | None = None


class SwitchedAttention(FlashAttention):
    """Causal attention of one layer's kind: a window or all keys, rotary positions or none, logits scaled or not.

    >>> SwitchedAttention(16, 2, kind=LayerKind(window=4))(torch.randn(1, 9, 16)).shape
    torch.Size([1, 9, 16])
    """

    def __init__(self, dim: int, heads: int, *, kind: LayerKind, **options: Any) -> None:
        pattern = full if kind.window is None else recent(kind.window)
        super().__init__(dim, heads, pattern=pattern, rotary=kind.rotary, **options)
        if kind.trained is not None and kind.trained < 2:
            raise ValueError(f"trained is a length whose logarithm divides others, at least 2; got {kind.trained}")
        self.trained = kind.trained

    def project(self, x: Tensor, context: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, context, first)
        if self.trained is None:
            return q, k, v
        seen = torch.arange(first + 1, first + 1 + x.shape[1], device=x.device, dtype=torch.float64)
        scale = (seen.log() / math.log(self.trained)).clamp_min(1)
        return (q * scale.unsqueeze(1)).to(q.dtype), k, v


class GatedLinear(nn.Module):
    """SwiGLU: silu of one linear layer times another, and a third."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.value = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.to_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(silu(self.gate(x)) * self.value(x))


class DecoderLayer(nn.Module):
    """Attention and a gated linear layer, each behind an RMS norm and beside a residual."""

    def __init__(self, mixer: SwitchedAttention, hidden: int) -> None:
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(mixer.dim, eps=1e-5), mixer
        self.channels_norm, self.channels = nn.RMSNorm(mixer.dim, eps=1e-5), GatedLinear(mixer.dim, hidden)

    def forward(self, x: Tensor, state: Any = None) -> StepOutput:
        """Tokens x (B, N, C), after those that ``state`` has seen if one is given."""
        normed = self.norm(x)
        mixed, after = (self.mixer(normed), None) if state is None else self.mixer.prefill(normed, state)
        x = x + mixed
        return StepOutput(x + self.channels(self.channels_norm(x)), after)


class Decoder(nn.Module):
    """Tokens (B, N) to logits of the next one (B, N, vocabulary); a cache for each layer, as long as it needs."""

    def __init__(
        self,
        vocabulary: int,
        kinds: Sequence[LayerKind],
        *,
        dim: int,
        heads: int,
        kv_heads: int,
        hidden: int,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        options: dict[str, Any] = {"kv_heads": kv_heads, "head_dim": head_dim}
        self.layers = nn.ModuleList(
            DecoderLayer(SwitchedAttention(dim, heads, kind=kind, **options), hidden) for kind in kinds
        )
        self.norm, self.head = nn.RMSNorm(dim, eps=1e-5), nn.Linear(dim, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self._through(tokens, [None] * len(self.layers)).out

    def init_state(self, batch: int, capacity: int | None = None) -> list[Any]:
        """Caches before the first token: layers with windows keep their windows, others all."""
        return [layer.mixer.init_state(batch, capacity) for layer in self.layers]  # type: ignore[operator, union-attr]

    def prefill(self, tokens: Tensor, state: list[Any]) -> StepOutput:
        """Logits of the next tokens (B, N), and the caches after them."""
        return self._through(tokens, state)

    def decode(self, tokens: Tensor, state: list[Any]) -> StepOutput:
        """Logits of one more token (B, 1)."""
        return self._through(tokens, state)

    def _through(self, tokens: Tensor, states: Sequence[Any]) -> StepOutput:
        x, after = self.embed(tokens), []
        for layer, state in zip(self.layers, states, strict=True):
            x, reached = layer(x, state)
            after.append(reached)
        return StepOutput(self.head(self.norm(x)), after)


@model(
    "swan_gpt",
    papers=("SWAN-GPT",),
    inputs="tokens",
    presets={"1B": Preset({})},
    tiny={"vocabulary": 16, "dim": 16, "depth": 5, "heads": 4, "kv_heads": 2, "hidden": 24, "window": 5, "trained": 9},
    supports={"decode"},
    notes="Sizes, the first layer's kind and the formula of the logit scale were not held against the paper's.",
)
def swan_gpt(
    vocabulary: int = 32_000,
    *,
    dim: int = 2048,
    depth: int = 24,
    heads: int = 16,
    kv_heads: int | None = None,
    hidden: int = 5632,
    window: int = 512,
    every: int = 4,
    trained: int = 8192,
    rotary: float = 10_000.0,
    kinds: Sequence[LayerKind] | None = None,
) -> Decoder:
    """SWAN-GPT: sliding windows with rotary positions, and every fourth layer all keys without positions.

    Layers 0, ``every``, 2 ``every``, ... see all keys and know no positions; beyond ``trained`` tokens their logits are
    multiplied by log n / log ``trained``, n the query's position, so that attention stays as sharp among more keys. The
    others see the last ``window`` keys, with rotary positions. ``kinds`` gives each layer's switches by itself instead.
    While decoding, only the former layers' caches grow.

    Puvvada et al., SWAN-GPT, arXiv 2504.08719, whose scale is logarithmic in the length as well.

    >>> swan_gpt(50, dim=32, depth=4, heads=4, hidden=64, window=8)(torch.randint(50, (2, 19))).shape
    torch.Size([2, 19, 50])
    """
    if every < 1:
        raise ValueError(f"every is how many layers there are to one that sees all keys, at least 1; got {every}")
    wide, near = LayerKind(None, None, trained), LayerKind(window, rotary)
    chosen = [near if index % every else wide for index in range(depth)] if kinds is None else list(kinds)
    sizes: dict[str, Any] = {"dim": dim, "heads": heads, "kv_heads": kv_heads or heads, "hidden": hidden}
    return Decoder(vocabulary, chosen, **sizes)


@model(
    "geb",
    papers=("GEB-1.3B",),
    inputs="tokens",
    presets={"1.3B": Preset({})},
    tiny={"vocabulary": 16, "dim": 16, "depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "hidden": 24},
    supports={"decode"},
)
def geb(
    vocabulary: int = 64_896,
    *,
    dim: int = 2048,
    depth: int = 24,
    heads: int = 16,
    kv_heads: int = 4,
    head_dim: int = 128,
    hidden: int = 5632,
    rotary: float = 10_000.0,
) -> Decoder:
    """GEB-1.3B: a decoder with rotary positions, a key head for every four query heads, RMS norms and SwiGLU.

    The sizes are those of the published configuration. Wu, Zhu, Shen, Lu, GEB-1.3B, arXiv 2406.09900.

    >>> geb(50, dim=32, depth=2, heads=4, kv_heads=1, head_dim=8, hidden=64)(torch.randint(50, (2, 19))).shape
    torch.Size([2, 19, 50])
    """
    kinds = [LayerKind(rotary=rotary)] * depth
    sizes: dict[str, Any] = {"dim": dim, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "hidden": hidden}
    return Decoder(vocabulary, kinds, **sizes)
