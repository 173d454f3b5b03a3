"""The small model that learns a task: the same around every mixer, so that what differs is the mixer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from foveate.adapt.named import mechanism
from foveate.catalogue.options import made, options_of
from foveate.lab.tasks.kinds import NOTHING, Batch
from foveate.layers.short_conv import ShortConv
from foveate.mixers.base import Mixer


class Block(nn.Module):
    """Norm and mixer, norm and MLP, each beside what passes by.

    A short convolution before the mixer lets any of them see which token came just before, as in the
    experiments of Zoology (arXiv 2312.04927): positions need no embedding, and what is compared is memory.
    """

    def __init__(self, mixer: Mixer, *, expand: int, conv: int) -> None:
        super().__init__()
        dim = mixer.dim
        self.norm, self.mixer = nn.RMSNorm(dim), mixer
        self.conv = ShortConv(dim, conv) if conv else None
        self.mlp = nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, expand * dim), nn.GELU(), nn.Linear(expand * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        near = self.norm(x)
        if self.conv is not None:
            near = near + self.conv(near).out
        x = x + self.mixer(near)
        return x + self.mlp(x)


class TaskModel(nn.Module):
    """Tokens (B, N) to logits (B, N, vocabulary).

    >>> import torch
    >>> model = TaskModel("gated_deltanet", vocabulary=20, dim=16, heads=2, layers=2)
    >>> model(torch.randint(20, (3, 9))).shape
    torch.Size([3, 9, 20])
    """

    def __init__(
        self, mixer: str, *, vocabulary: int, dim: int, heads: int, layers: int, expand: int = 2, conv: int = 4
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.embed.weight, std=dim**-0.5)
        blocks = [Block(make_mixer(mixer, dim, heads), expand=expand, conv=conv) for _ in range(layers)]
        self.blocks, self.norm = nn.Sequential(*blocks), nn.RMSNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))))

    def judge(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy in nats of the answers asked, and the share that is right."""
        asked = batch.answers != NOTHING
        x = self.blocks(self.embed(batch.tokens))
        logits, answers = self.head(self.norm(x[asked])), batch.answers[asked]
        return nn.functional.cross_entropy(logits, answers), (logits.argmax(-1) == answers).float().mean()

    def state_bytes(self, length: int) -> int:
        """Bytes that decoding keeps after so many tokens, in all the mixers."""
        return sum(module.state_bytes(length) for module in self.modules() if isinstance(module, Mixer))


def make_mixer(text: str, dim: int, heads: int) -> Mixer:
    """A causal mixer from its name, with options or without, as in ``gated_deltanet(conv=0)``.

    Raises ValueError for an unknown name, for one that is no causal mechanism on sequences, and for options
    that it does not take.
    """
    row, options = _named(text)
    if "causal" not in row.supports:
        raise ValueError(f"{row.name} is not causal: it would see the answers")
    usual = {"heads": heads} if "heads" in options_of(row.mixer) else {}
    try:
        return made(row.name, row.mixer, usual | options, dim)
    except TypeError as error:
        raise ValueError(f"{text}: {error}") from None


def _named(text: str) -> Any:
    found = mechanism(text)
    if found is None:
        raise ValueError(f"a mixer is the name of a mechanism (`foveate list`), with options or without; got {text!r}")
    return found
