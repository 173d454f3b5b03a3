"""Where attention sinks lie while a masked diffusion language model writes, and what it costs to hide them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from foveate.attention import attend
from foveate.catalogue.contracts import Finding
from foveate.catalogue.tiers import probe
from foveate.lab.probes.picture import Curve, curves
from foveate.mixers.base import join_heads
from foveate.mixers.exact_io.flash_attention import FlashAttention
from foveate.patterns import Pattern, boolean_mask, causal, full


def key_mass(q: Tensor, k: Tensor, pattern: Pattern = full) -> Tensor:
    """The share of all queries' attention that each key takes, (B, H, M), of queries and keys (B, H, N, D).

    >>> key_mass(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 2, 4))
    tensor([[[0.5000, 0.5000]]])
    """
    each = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
    return attend(q, k, each, pattern).mean(2)


def without(hidden: Tensor, queries: int, pattern: Pattern = full) -> Pattern:
    """A pattern with these keys, booleans (B, M), taken from it.

    >>> without(torch.tensor([[True, False]]), 2).mask(2)[0, 0].int()
    tensor([[0, 1],
            [0, 1]], dtype=torch.int32)
    """
    seen = boolean_mask((~hidden)[:, None, None].expand(-1, -1, queries, -1))
    return seen if pattern is full else seen & pattern


class Written(NamedTuple):
    """What was written, (B, N), and the mass of each key at each step: (steps, layers, B, H, N)."""

    tokens: Tensor
    mass: Tensor


class WatchedLM(nn.Module):
    """A small language model whose layers tell the mass of their keys; ``is_causal`` or, to write by unmasking, not."""

    def __init__(self, vocabulary: int, length: int, *, dim: int, heads: int, layers: int, is_causal: bool) -> None:
        super().__init__()
        self.mask, self.is_causal = vocabulary, is_causal
        self.embed, self.places = nn.Embedding(vocabulary + 1, dim), nn.Embedding(length, dim)
        self.mixers = nn.ModuleList(FlashAttention(dim, heads, causal=is_causal) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            for _ in range(layers)
        )
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, tokens: Tensor, *, hide_top: int = 0) -> tuple[Tensor, Tensor]:
        """Logits (B, N, vocabulary) and masses (layers, B, H, N).

        In each layer the ``hide_top`` keys of greatest mass are hidden from all queries; if causal, not their own.
        """
        x = self.embed(tokens) + self.places.weight[: tokens.shape[1]]
        pattern: Pattern = causal if self.is_causal else full
        masses = []
        for mixer, norm, mlp in zip(self.mixers, self.norms, self.mlps, strict=True):
            assert isinstance(mixer, FlashAttention)
            normed = norm(x)
            q, k, v = mixer.project(normed, normed)
            with torch.no_grad():
                masses.append(key_mass(q, k, pattern))
            seen = pattern
            if hide_top:
                best = masses[-1].mean(1).topk(hide_top, dim=-1).indices
                hidden = torch.zeros(tokens.shape, dtype=torch.bool).scatter(1, best, True)
                seen = without(hidden, tokens.shape[1], pattern)
                if self.is_causal:  # a first token that sees nothing would cost for another reason
                    seen = seen | boolean_mask(torch.eye(tokens.shape[1]).bool())
            x = x + mixer.to_out(join_heads(attend(q, k, v, seen)))
            x = x + mlp(x)
        return self.head(x), torch.stack(masses)


def sentences(batch: int, length: int, vocabulary: int) -> Tensor:
    """Tokens that each follow from the two before them, from random ones on: (B, N)."""
    tokens = [torch.randint(vocabulary, (batch,)) for _ in range(2)]
    while len(tokens) < length:
        tokens.append((tokens[-1] + 2 * tokens[-2] + 1) % vocabulary)
    return torch.stack(tokens, 1)


def loss_of(model: WatchedLM, tokens: Tensor, *, hide_top: int = 0) -> Tensor:
    """Cross-entropy of next tokens, or of those that a random share of masks covers."""
    if model.is_causal:
        logits, _ = model(tokens[:, :-1], hide_top=hide_top)
        return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    covered = torch.rand(tokens.shape) < torch.rand(len(tokens), 1).clamp_min(0.1)
    covered[:, 0] |= ~covered.any(1)
    logits, _ = model(tokens.masked_fill(covered, model.mask), hide_top=hide_top)
    return cross_entropy(logits[covered], tokens[covered])


@torch.no_grad()
def write(model: WatchedLM, batch: int, length: int, steps: int) -> Written:
    """Write texts: all masks at first, the surest revealed first, or, causal, a token after the other."""
    if model.is_causal:
        tokens, masses = sentences(batch, 2, model.mask), []
        while tokens.shape[1] < length:
            logits, mass = model(tokens)
            masses.append(nn.functional.pad(mass, (0, length - mass.shape[-1])))
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        return Written(tokens, torch.stack(masses))
    tokens, masses = torch.full((batch, length), model.mask), []
    for step in range(steps):
        logits, mass = model(tokens)
        masses.append(mass)
        sure, best = logits.softmax(-1).max(-1)
        sure = sure.masked_fill(tokens != model.mask, -1)
        left = (length * (steps - step - 1)) // steps
        revealed = sure.topk(length - left - int((tokens[0] != model.mask).sum()), dim=-1).indices
        tokens = tokens.scatter(1, revealed, best.gather(1, revealed))
    return Written(tokens, torch.stack(masses))


def moves(mass: Tensor) -> float:
    """How often the key of greatest mass is another than a step before, of masses (steps, layers, B, H, N)."""
    top = mass.mean(3).argmax(-1)
    return float((top[1:] != top[:-1]).double().mean())


@probe(
    "diffusion_sinks",
    papers=("Attention sinks in DLMs",),
    tiny={"steps": 3, "length": 10, "dim": 16, "layers": 1, "batch": 4, "writing": 5},
)
def diffusion_sinks(
    seed: int = 0,
    *,
    steps: int = 300,
    length: int = 24,
    vocabulary: int = 7,
    dim: int = 32,
    heads: int = 4,
    layers: int = 2,
    batch: int = 32,
    writing: int = 12,
) -> Finding:
    """Sinks of a masked diffusion language model move while it writes, and hiding them costs it less than a causal one.

    Two small models of one shape learn sentences whose tokens follow from the two before them, one to fill masks with
    attention to all tokens, the other causally to say what comes next. Each writes texts while the mass of every key is
    noted, by step, layer and head; then in each layer the key of greatest mass is hidden, and losses are compared.
    Confirmed where both the moves and the costs compare as the paper has it; models of two layers may well refute it.

    Rulli, Petruzzi, Michielon, Silvestri, Scardapane, Devoto, Attention Sinks in Diffusion Language Models,
    arXiv 2510.15731.
    """
    figures: dict[str, float] = {}
    lines = []
    with torch.random.fork_rng(devices=[]):
        for name, is_causal in (("diffusion", False), ("causal", True)):
            torch.manual_seed(seed)
            model = WatchedLM(vocabulary, length, dim=dim, heads=heads, layers=layers, is_causal=is_causal)
            optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
            for _ in range(steps):
                optimizer.zero_grad()
                loss_of(model, sentences(batch, length, vocabulary)).backward()
                optimizer.step()
            torch.manual_seed(seed + 1)
            tried = sentences(4 * batch, length, vocabulary)
            with torch.no_grad():
                losses = []
                for hide_top in (0, 1):
                    torch.manual_seed(seed + 2)
                    losses.append(float(loss_of(model, tried, hide_top=hide_top)))
            written = write(model, batch, length, writing)
            tops = written.mass.mean((2, 3)).mean(1)  # (steps, N)
            figures |= {
                f"{name}: loss": losses[0],
                f"{name}: loss with sinks hidden": losses[1],
                f"{name}: share of steps at which the sink moves": moves(written.mass),
                f"{name}: mass of the first token": float(tops[:, 0].mean()),
                f"{name}: greatest mass of a token": float(written.mass.mean(3).amax(-1).mean()),
            }
            lines.append(Curve(name, list(map(float, range(len(tops)))), tops.argmax(-1).double().tolist()))
    cost = {
        name: figures[f"{name}: loss with sinks hidden"] - figures[f"{name}: loss"] for name in ("diffusion", "causal")
    }
    moved = {name: figures[f"{name}: share of steps at which the sink moves"] for name in cost}
    confirmed = moved["diffusion"] > moved["causal"] and cost["diffusion"] < cost["causal"]
    title = "place of the key that takes most attention, by step"
    picture = curves(title, lines, x="step", y="place of the key")
    claim = "sinks of masked diffusion language models move while they write, and masking them degrades little"
    return Finding(claim, confirmed, figures, picture)
