"""Do classifiers of long documents gain from reading more: by windows with a global token, and by a hierarchy?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from foveate.catalogue.contracts import Finding
from foveate.catalogue.registry import mixer
from foveate.catalogue.tiers import probe
from foveate.lab.probes.bars import bars
from foveate.mixers.attention import AttentionMixer
from foveate.mixers.core import PatternCore
from foveate.patterns import Pattern, full, global_tokens, window

WORDS, CLASSES, MARKS = 24, 4, 3


class EncoderLayer(nn.Module):
    """Bidirectional attention over a pattern and an MLP, each behind a norm and beside a residual."""

    def __init__(self, dim: int, heads: int, pattern: Pattern = full) -> None:
        super().__init__()
        made: Any = mixer("flash_attention", dim, heads=heads, causal=False)
        assert isinstance(made, AttentionMixer)
        made.core = PatternCore(pattern)
        self.attention, self.norm, self.mlp_norm = made, nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.mlp_norm(x))


class LocalGlobal(nn.Module):
    """Tokens (B, N) to classes: windows of ``reach`` tokens to each side, and a first token that all see."""

    def __init__(self, dim: int, depth: int, heads: int, reach: int) -> None:
        super().__init__()
        self.embed, self.first = nn.Embedding(WORDS, dim), nn.Parameter(torch.randn(1, 1, dim))
        pattern = window(reach) | global_tokens([0])
        self.layers = nn.Sequential(*(EncoderLayer(dim, heads, pattern) for _ in range(depth)))
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(len(tokens), -1, -1), self.embed(tokens)], 1)
        return self.head(self.layers(x)[:, 0])


class Hierarchy(nn.Module):
    """Tokens (B, N) to classes: segments of ``segment`` tokens are read one by one, then what was read of each."""

    def __init__(self, dim: int, depth: int, heads: int, segment: int) -> None:
        super().__init__()
        self.embed, self.segment = nn.Embedding(WORDS, dim), segment
        self.first, self.last = (nn.Parameter(torch.randn(1, 1, dim)) for _ in range(2))
        self.segments, self.document = (
            nn.Sequential(*(EncoderLayer(dim, heads) for _ in range(layers))) for layers in (depth, 1)
        )
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] % self.segment:
            raise ValueError(f"a document has segments of {self.segment} tokens; got {tokens.shape[1]} tokens")
        parts = self.embed(tokens).unflatten(1, (-1, self.segment)).flatten(0, 1)
        read = self.segments(torch.cat([self.first.expand(len(parts), -1, -1), parts], 1))[:, 0]
        document = torch.cat([self.last.expand(len(tokens), -1, -1), read.unflatten(0, (len(tokens), -1))], 1)
        return self.head(self.document(document)[:, 0])


def documents_of(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Words (B, N) of a text on one of four subjects: three more words of it than of any other, anywhere."""
    label = torch.randint(CLASSES, (batch,), generator=generator)
    words = torch.randint(CLASSES, WORDS, (batch, length), generator=generator)
    order = torch.rand(batch, length, generator=generator).argsort(1)
    words.scatter_(1, order[:, :MARKS], label.unsqueeze(1).expand(-1, MARKS))
    words.scatter_(1, order[:, MARKS : MARKS + CLASSES], torch.arange(CLASSES).expand(batch, -1))
    return words, label


def accuracy(model: nn.Module, length: int, read: int, steps: int, generator: torch.Generator) -> float:
    """The share of right answers of a model that has learned from the first ``read`` words of documents."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        words, label = documents_of(32, length, generator)
        loss = cross_entropy(model(words[:, :read]), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        words, label = documents_of(512, length, generator)
        return (model(words[:, :read]).argmax(1) == label).float().mean().item()


@probe(
    "long_documents",
    papers=("TrLDC study",),
    tiny={"length": 16, "steps": 2, "segment": 4},
)
def long_documents(seed: int = 0, *, length: int = 48, steps: int = 60, reach: int = 4, segment: int = 12) -> Finding:
    """Classifiers of long documents gain from reading all of them, by local attention and by hierarchies alike.

    Both designs that the study compares learn from whole documents of ``length`` words and from their first quarters:
    windows of ``reach`` words on each side with a global token, and segments of ``segment`` words read one by one
    beneath an encoder of the document. Documents are made up here: words of a subject stand anywhere in noise.

    Dai, Chalkidis, Darkner, Elliott, Revisiting Transformer-based Models for Long Document Classification,
    arXiv 2204.06683.
    """
    figures = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, read in (("all", length), ("a quarter", length // 4)):
            for design in ("local", "hierarchy"):
                model = LocalGlobal(32, 2, 4, reach) if design == "local" else Hierarchy(32, 1, 4, segment)
                generator = torch.Generator().manual_seed(seed)
                figures[f"{design}, {name}"] = accuracy(model, length, read, steps, generator)
    gains = {design: figures[f"{design}, all"] - figures[f"{design}, a quarter"] for design in ("local", "hierarchy")}
    claim = "reading a whole document beats reading its beginning, with local attention and with a hierarchy"
    picture = bars("Right answers on long documents", figures, "share")
    return Finding(claim, min(gains.values()) > 0.1, figures, picture)
