"""TransNormerLLM as a language model: decaying linear attention and gated linear layers by turns."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import rms_norm

from foveate.catalogue.tiers import Preset, model
from foveate.mixers.base import StepOutput
from foveate.mixers.linear.transnormer_llm import TransNormerLLM
from foveate.mixers.recurrent import RecurrentState


def simple_norm(x: Tensor) -> Tensor:
    """RMS norm of each token (..., C) without weights."""
    return rms_norm(x, x.shape[-1:], eps=1e-6)


class SimpleGLU(nn.Module):
    """Two linear layers multiplied, without an activation, and a third.

    >>> import torch
    >>> SimpleGLU(8, 24)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.value = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.to_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(self.gate(x) * self.value(x))


class LayerOutput(NamedTuple):
    out: Tensor
    state: RecurrentState | None


class TransNormerLayer(nn.Module):
    """A token mixer and a channel mixer, each behind a norm and beside a residual."""

    def __init__(self, mixer: TransNormerLLM, hidden: int) -> None:
        super().__init__()
        self.mixer, self.channels = mixer, SimpleGLU(mixer.dim, hidden)

    def forward(self, x: Tensor, state: RecurrentState | None = None) -> LayerOutput:
        """Tokens x (B, N, C), after those that ``state`` has seen if one is given."""
        normed = simple_norm(x)
        mixed, after = (self.mixer(normed), None) if state is None else self.mixer.prefill(normed, state)
        x = x + mixed
        return LayerOutput(x + self.channels(simple_norm(x)), after)


class TransNormer(nn.Module):
    """Tokens (B, N) to logits of the next one (B, N, vocabulary); decodes with a state of constant size."""

    def __init__(self, vocabulary: int, layers: list[TransNormerLayer], dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self._through(tokens, [None] * len(self.layers)).out

    def init_state(self, batch: int, capacity: int | None = None) -> list[RecurrentState]:
        """The state before the first token; it takes the same room however many tokens come."""
        return [layer.mixer.init_state(batch, capacity) for layer in self.layers]  # type: ignore[operator, union-attr]

    def prefill(self, tokens: Tensor, state: list[RecurrentState]) -> StepOutput:
        """Logits of the next tokens (B, N), and the state after them."""
        return self._through(tokens, state)

    def decode(self, tokens: Tensor, state: list[RecurrentState]) -> StepOutput:
        """Logits of one more token (B, 1)."""
        return self._through(tokens, state)

    def _through(self, tokens: Tensor, states: list[RecurrentState] | list[None]) -> StepOutput:
        x = math.sqrt(self.embed.embedding_dim) * self.embed(tokens)
        after = []
        for layer, state in zip(self.layers, states, strict=True):
            x, reached = layer(x, state)
            after.append(reached)
        return StepOutput(self.head(simple_norm(x)), after)


@model(
    "transnormer",
    papers=("TransNormerLLM",),
    inputs="tokens",
    presets={
        "385M": Preset({}),
        "1B": Preset({"dim": 2048, "depth": 16, "heads": 16}),
        "7B": Preset({"dim": 4096, "depth": 30, "heads": 32}),
    },
    tiny={"vocabulary": 16, "dim": 24, "depth": 3, "heads": 2, "hidden": 40},
    supports={"decode"},
    notes="Presets were not held against the authors' configurations; the hidden width is 8/3 of dim here.",
)
def transnormer(
    vocabulary: int = 64_000,
    *,
    dim: int = 1024,
    depth: int = 24,
    heads: int = 8,
    hidden: int | None = None,
    decay_scale: float = 1.0,
    lrpe: bool = True,
) -> TransNormer:
    """TransNormerLLM: decaying linear attention with a gate, and gated linear layers. The sizes are those of 385M.

    The first of ``depth`` layers turns its channels (LRPE) where ``lrpe``; decay rates fall from ``decay_scale`` times
    ALiBi's slopes in the first layer to nearly nothing in the last. ``hidden`` is the width of the channel mixer, by
    default 8/3 of ``dim`` in whole multiples of 256.

    Qin et al., TransNormerLLM, arXiv 2307.14995.

    >>> import torch
    >>> transnormer(50, dim=32, depth=2, heads=4)(torch.randint(50, (2, 19))).shape
    torch.Size([2, 19, 50])
    """
    width = -(-8 * dim // 768) * 256 if hidden is None else hidden

    def layer(index: int) -> TransNormerLayer:
        scale = decay_scale * (1 - index / max(depth - 1, 1) + 1e-5)
        return TransNormerLayer(TransNormerLLM(dim, heads, decay_scale=scale, lrpe=lrpe and index == 0), width)

    return TransNormer(vocabulary, [layer(index) for index in range(depth)], dim)
