"""Mamba over long contexts: fewer tokens reach the scan, or notes of them are kept beside its state."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from foveate.catalogue.registry import register
from foveate.mixers.base import StepOutput
from foveate.mixers.recurrent_ssm.mamba import Mamba, MambaState, SSMParams
from foveate.mixers.stateful import Lengths, StatefulMixer
from foveate.precision import to_accum

BLOCK = 1024  # tokens whose notes are gathered at once


class Decimated(NamedTuple):
    """What a layer says of the tokens it kept, (B, P, C), their positions (B, P), and the state after them."""

    out: Tensor
    kept: Tensor
    state: MambaState


@register(
    "decimamba",
    papers=("DeciMamba",),
    formula="out = scan(u_t for t among the P greatest mean_c Δ_tc, in order), 0 elsewhere",
    supports={"causal", "padding"},
    notes=(
        "Has no parameters but Mamba's, whose weights it takes. Tokens are dropped from a prompt: decoding goes on "
        "from prefill(x), token by token, as with mamba. The authors' code takes the norm of Δ in place of its mean."
    ),
)
class DeciMamba(Mamba):
    """Mamba whose scan sees only the ``keep`` tokens with the greatest step sizes, in their order.

    The ``last`` tokens, which ask or answer, are among them in any case; the convolution still reads every token.
    In a stack, :func:`tokens_to_keep` says how many for each layer; ``decimate`` hands on the kept tokens only, so
    that deeper layers are shorter.

    >>> trained = Mamba(64)
    >>> mixer = DeciMamba(64, keep=20)
    >>> mixer.load_state_dict(trained.state_dict())
    <All keys matched successfully>
    >>> mixer.decimate(torch.randn(2, 50, 64)).out.shape
    torch.Size([2, 20, 64])
    """

    tiny: ClassVar[dict[str, Any]] = {"keep": 11}
    exempt: ClassVar[dict[str, str]] = {"causality": "which tokens are kept depends on the step sizes of all of them"}

    def __init__(
        self,
        dim: int,
        *,
        keep: int = 2048,
        last: int = 1,
        expand: int = 2,
        state: int = 16,
        conv: int = 4,
        rank: int | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__(dim, expand=expand, state=state, conv=conv, rank=rank, causal=causal)
        if not 0 <= last <= keep or keep < 1:
            raise ValueError(f"keep, at least 1, counts the last tokens, too; got keep={keep} and last={last}")
        self.keep, self.last = keep, last

    def run(self, x: Tensor, state: MambaState | None, lengths: Lengths, key_mask: Tensor | None) -> StepOutput:
        if x.shape[1] <= self.keep:
            return super().run(x, state, lengths, key_mask)
        out, kept, state = self.decimate(x, state, key_mask)
        spread = torch.zeros_like(x).scatter(1, kept.unsqueeze(-1).expand_as(out), out)
        return StepOutput(spread, state)

    def prefill(self, x: Tensor, state: MambaState | None = None) -> StepOutput:
        """Read a prompt x (B, N, C), decimated; ``decode`` then goes on from the state."""
        return super().prefill(x, self.empty_state(x.shape[0], None) if state is None else state)

    def decimate(self, x: Tensor, state: MambaState | None = None, key_mask: Tensor | None = None) -> Decimated:
        """The layer over x (B, N, C), at the tokens it keeps only."""
        before, tail = (None, None) if state is None else state
        u, gate = self.to_in(x).chunk(2, dim=-1)
        u, tail = self.branch.conv(u, tail)
        ssm = self.branch.ssm
        chosen = ssm.chosen(u, key_mask)
        importance = ssm.sizes(chosen).mean(-1).masked_fill(self.at_end(x, key_mask), torch.inf)  # (B, N)
        kept = importance.topk(min(self.keep, x.shape[1]), dim=1).indices.sort(dim=1).values
        u, gate, *choices = (gathered(each, kept) for each in (u, gate, *chosen))
        out, after = ssm.scan(u, SSMParams(*choices), gate=gate, state=before)
        return Decimated(self.to_out(out), kept, MambaState(after, tail))

    def at_end(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """Where the last real tokens are, (B, N)."""
        key_mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if key_mask is None else key_mask
        return key_mask & (key_mask.flip(1).cumsum(1).flip(1) <= self.last)


def tokens_to_keep(layers: int, base: int, *, fade: float = 0.75, least: int = 1) -> list[int]:
    """How many tokens each of the decimating layers keeps: ``base``, falling by ``fade`` with depth.

    >>> tokens_to_keep(4, 1000, fade=0.5, least=200)
    [1000, 500, 250, 200]
    """
    if not 0 < fade <= 1:
        raise ValueError(f"fade is the share of tokens kept from layer to layer, in (0, 1]; got {fade}")
    return [max(least, int(base * fade**layer)) for layer in range(layers)]


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of x (B, N, C) at positions (B, P)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class Notes(NamedTuple):
    """A layer's pool: notes (B, slots, D), of which the last ``filled`` (B,) are written."""

    pool: Tensor
    filled: Tensor


class LayerState(NamedTuple):
    """State of one layer: the scan's, its notes, and how much the last token feared to forget, (B, 1, 1)."""

    scan: MambaState
    notes: Notes
    fear: Tensor


class Pages(NamedTuple):
    """Pools as each of N queries finds them: slots of ``notes`` (B, M, D) from ``first`` (B, N) on.

    Places below ``empty`` (B,) hold no note.
    """

    notes: Tensor
    first: Tensor
    empty: Tensor
    slots: int

    def read(self, queries: slice) -> tuple[Tensor, Tensor]:
        """The notes (B, n, slots, D) that these queries may read, and which of them are written, (B, n, slots)."""
        place = self.first[:, queries, None] + torch.arange(self.slots, device=self.first.device)
        notes = gathered(self.notes, place.flatten(1)).unflatten(1, place.shape[1:])
        return notes, place >= self.empty.view(-1, 1, 1)


class NoteLayer(nn.Module):
    """A Mamba layer that writes notes of important tokens, and reads them where its state may have forgotten."""

    def __init__(self, dim: int, mamba: Mamba, *, slots: int, width: int, threshold: float, across: bool) -> None:
        super().__init__()
        self.slots, self.threshold = slots, threshold
        self.norm, self.mamba = nn.RMSNorm(dim, eps=1e-5), mamba
        self.to_note, self.to_importance = nn.Linear(dim, width, bias=False), nn.Linear(dim, 1)
        self.to_query, self.to_fear = nn.Linear(dim, width, bias=False), nn.Linear(dim, 1)
        self.from_tokens = nn.Linear(width, dim, bias=False)
        self.from_layers = nn.Linear(width, dim, bias=False) if across else None

    def forward(
        self, h: Tensor, state: LayerState, key_mask: Tensor | None, below: list[Pages]
    ) -> tuple[Tensor, LayerState, Pages]:
        """What the layer adds to h (B, N, C), its state, and the pages that layers above may read."""
        x = self.norm(h)
        y, scan = self.mamba.run(x, state.scan, None, key_mask)
        pages, notes = self.take_notes(x, state.notes, key_mask)
        fear = torch.cat([state.fear, torch.sigmoid(self.to_fear(y))], dim=1)  # of the token before
        asking = torch.where(fear > self.threshold, fear, 0)[:, : x.shape[1]]
        query = self.to_query(x)
        out = y + self.from_tokens(asking * recalled(query, [pages]))
        if self.from_layers is not None:
            out = out + self.from_layers(recalled(query, [*below, pages]))
        return out, LayerState(scan, notes, fear[:, -1:]), pages

    def take_notes(self, x: Tensor, notes: Notes, key_mask: Tensor | None) -> tuple[Pages, Notes]:
        """The pool as each token finds it, and as the last one leaves it: the newest note takes the oldest's place."""
        importance = torch.sigmoid(self.to_importance(x))
        noted = importance.squeeze(-1) > self.threshold
        if key_mask is not None:
            noted = noted & key_mask
        ahead = (~noted).long().argsort(dim=1, stable=True)  # noted tokens in their order, then the others
        written = torch.cat([notes.pool, gathered(importance * self.to_note(x), ahead)], dim=1)
        count = noted.long().cumsum(1)
        pages = Pages(written, count - noted.long(), self.slots - notes.filled, self.slots)
        total = noted.long().sum(1, keepdim=True)
        pool = gathered(written, total + torch.arange(self.slots, device=x.device))
        return pages, Notes(pool, (notes.filled + total.squeeze(1)).clamp(max=self.slots))

    def init_state(self, batch: int) -> LayerState:
        weight = self.to_note.weight
        pool = weight.new_zeros(batch, self.slots, weight.shape[0])
        filled = torch.zeros(batch, dtype=torch.long, device=weight.device)
        return LayerState(self.mamba.empty_state(batch, None), Notes(pool, filled), weight.new_zeros(batch, 1, 1))


def recalled(query: Tensor, pages: list[Pages]) -> Tensor:
    """Attention of each query (B, N, D) to the notes of all ``pages``; zeros where there are none."""
    parts = [slice(start, start + BLOCK) for start in range(0, max(1, query.shape[1]), BLOCK)]
    return torch.cat([recalled_by(query[:, part], [page.read(part) for page in pages]) for part in parts], dim=1)


def recalled_by(query: Tensor, found: list[tuple[Tensor, Tensor]]) -> Tensor:
    notes, written = (torch.cat(each, dim=2) for each in zip(*found, strict=True))
    scores = to_accum(query.unsqueeze(2) @ notes.mT).squeeze(2) * query.shape[-1] ** -0.5
    none = ~written.any(-1, keepdim=True)
    weights = scores.masked_fill(~written & ~none, -torch.inf).softmax(-1).masked_fill(none, 0)
    return (weights.to(notes.dtype).unsqueeze(2) @ notes).squeeze(2)


@register(
    "memmamba",
    papers=("MemMamba",),
    formula="h' = h + mamba(h) + F_tok(attend(h_t, notes of the layer)) + F_lay(attend(h_t, notes of all layers))",
    supports={"causal", "padding", "decode"},
    notes=(
        "A pool keeps the newest notes, one of the paper's two ways to replace them. Importance and the fear of "
        "forgetting are sigmoids of a linear layer, which the paper leaves open; both also weigh what they let "
        "through, which is how they learn. Padding lies at the ends of a sequence, as with mamba."
    ),
)
class MemMamba(StatefulMixer):
    """Mamba layers that take notes: a pool of ``slots`` summaries for each, read by attention.

    Tokens whose importance exceeds ``threshold`` leave a note of ``width`` numbers. A token reads the pool of its
    layer where the one before feared to forget, and in every ``every``-th layer those of all layers up to there.
    Returned is what all ``depth`` layers add to x.

    >>> mixer = MemMamba(64, depth=2, slots=8)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    tiny: ClassVar[dict[str, Any]] = {"slots": 5, "width": 7, "expand": 1, "state": 4}

    def __init__(
        self,
        dim: int,
        *,
        depth: int = 2,
        every: int = 2,
        slots: int = 50,
        width: int = 64,
        threshold: float = 0.5,
        expand: int = 2,
        state: int = 16,
        conv: int = 4,
        rank: int | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__(dim, causal=causal)
        if min(depth, every, slots, width) < 1:
            raise ValueError(f"depth, every, slots and width are at least 1; got {depth}, {every}, {slots} and {width}")
        self.layers = nn.ModuleList(
            NoteLayer(
                dim,
                Mamba(dim, expand=expand, state=state, conv=conv, rank=rank),
                slots=slots,
                width=width,
                threshold=threshold,
                across=layer % every == every - 1,
            )
            for layer in range(depth)
        )

    def run(
        self, x: Tensor, state: tuple[LayerState, ...] | None, lengths: Lengths, key_mask: Tensor | None
    ) -> StepOutput:
        h, states = x, state or self.empty_state(x.shape[0], None)
        after: list[LayerState] = []
        pages: list[Pages] = []
        for layer, before in zip(self.layers, states, strict=True):
            added, left, page = layer(h, before, key_mask, pages)
            h = h + added
            after.append(left)
            pages.append(page)
        return StepOutput(h - x, tuple(after))

    def empty_state(self, batch: int, capacity: int | None) -> tuple[LayerState, ...]:
        return tuple(layer.init_state(batch) for layer in self.layers if isinstance(layer, NoteLayer))


def linears(layer: NoteLayer) -> list[nn.Linear]:
    """The linear layers beside Mamba's."""
    return [each for each in layer.children() if isinstance(each, nn.Linear)]
