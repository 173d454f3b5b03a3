"""LongHeads: heads that each select chunks of a text beyond the trained length, and attend to them as if adjacent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.attention import attend
from foveate.cache.memory import LayerMemory, Look, Turn
from foveate.cache.slots import FREE
from foveate.patterns import boolean_mask, causal, full

AT_ONCE = 1 << 24  # numbers of keys that are gathered for some queries together


@dataclass(frozen=True)
class Text:
    """One text: what stands for its whole chunks (H, c, D), and the queries (H, t, D) of the chunk begun after them."""

    chunks: Tensor
    tail: Tensor


class LongHeadsMemory(LayerMemory):
    """A cache of all tokens; from ``count * chunk`` on, each head of each query sees ``count`` chunks that it selects.

    The first chunk, the query's own and the one before are always seen, the others by the product of the query and
    what stands for a chunk, neither of them turned to its place in the text. Chosen chunks are moved together, in
    their order, and the query to the last of them, so that no distance exceeds ``count * chunk``.

    Lu et al., LongHeads: Multi-Head Attention is Secretly a Long Context Processor, arXiv 2402.10685.
    """

    def __init__(self, chunk: int, count: int) -> None:
        super().__init__()
        self.chunk, self.count = chunk, count
        self.reach = chunk * count
        self.texts: list[Text] | None = None
        self.after: list[Text] | None = None  # with the tokens of the last call, which may be taken back yet

    def look(self, q: Tensor, look: Look) -> Tensor:
        assert self.slots is not None
        if look.width is not None and look.width <= self.reach:
            return super().look(q, look)
        if look.turn is None:
            raise NotImplementedError("chunks are moved by rotary positions, which this model does not have")
        self.after = [self.grown(q, look, entry) for entry in range(q.shape[0])]
        if self.seen <= self.reach:
            return super().look(q, look)
        out = q.new_zeros(*q.shape[:3], self.slots.v.shape[3])
        for entry in range(q.shape[0]):
            rows = (look.position[entry] != FREE).nonzero().squeeze(1)
            k, v = self.text_of(entry)
            if len(rows):
                given = self.options_of(look, entry)
                heads = self.of_entry(q[entry, :, rows], k, v, self.after[entry].chunks, look.turn, given)
                out[entry, :, rows] = heads
        return out

    def settle(self, q: Tensor, look: Look) -> None:
        if self.after is not None:
            count = self.after[0].chunks.shape[1] * self.chunk + self.after[0].tail.shape[1] if not look.padded else -1
            whole = count == self.seen
            self.texts = self.after if whole else [self.grown(q, look, entry) for entry in range(q.shape[0])]
            self.after = None

    def text_of(self, entry: int) -> tuple[Tensor, Tensor]:
        """Keys and values (G, n, D) of one text, without padding."""
        assert self.slots is not None
        there = self.slots.position[entry, 0] != FREE
        k, v = self.slots.k[entry], self.slots.v[entry]
        return (k, v) if bool(there.all()) else (k[:, there], v[:, there])

    @staticmethod
    def options_of(look: Look, entry: int) -> dict[str, Any]:
        return {name: value for name, value in look.options.items() if name != "bias"}

    # ---- what stands for chunks ----------------------------------------------------------------------------------

    def grown(self, q: Tensor, look: Look, entry: int) -> Text:
        """A text with the tokens of this call."""
        assert look.turn is not None
        rows = (look.position[entry] != FREE).nonzero().squeeze(1)
        fresh = q[entry, :, rows].detach()
        old = self.texts[entry] if self.texts is not None else Text(fresh[:, :0], fresh[:, :0])
        tail = torch.cat([old.tail, fresh], 1)
        first, whole = old.chunks.shape[1], tail.shape[1] // self.chunk
        if not whole:
            return Text(old.chunks, tail)
        keys = slice(first * self.chunk, (first + whole) * self.chunk)
        k, v = (x[:, keys] for x in self.text_of(entry))
        with torch.no_grad():
            new = self.representatives(tail[:, : whole * self.chunk], k, v, first, look.turn, look.options.get("scale"))
        return Text(torch.cat([old.chunks, new], 1), tail[:, whole * self.chunk :])

    def representatives(self, q: Tensor, k: Tensor, v: Tensor, first: int, turn: Turn, scale: float | None) -> Tensor:
        """(H, c, D) of c whole chunks: their attention's mean output attends to their keys.

        Queries and keys have their positions within the chunk.
        """
        count = k.shape[1] // self.chunk
        begin = self.chunk * (first + torch.arange(count, device=k.device)).repeat_interleave(self.chunk)
        q, k = (turn(x[None], -begin[None])[0].unflatten(1, (count, self.chunk)).transpose(0, 1) for x in (q, k))
        v = v.unflatten(1, (count, self.chunk)).transpose(0, 1)  # (c, G, w, D)
        mean = attend(q, k, v, full, scale=scale).mean(2, keepdim=True)
        return attend(mean, k, k, full, scale=scale).squeeze(2).transpose(0, 1)

    # ---- attention -----------------------------------------------------------------------------------------------

    def of_entry(self, q: Tensor, k: Tensor, v: Tensor, chunks: Tensor, turn: Turn, options: dict[str, Any]) -> Tensor:
        """Heads out (H, N, Dv) of the last queries (H, N, D) of one text."""
        start = k.shape[1] - q.shape[1]
        near = min(max(self.reach - start, 0), q.shape[1])  # queries within the trained length
        parts = []
        if near:
            keys = slice(0, start + near)
            parts.append(attend(q[None, :, :near], k[None, :, keys], v[None, :, keys], causal, **options)[0])
        step = max(1, AT_ONCE // (q.shape[0] * self.reach * q.shape[2]))
        for at in range(near, q.shape[1], step):
            few = q[:, at : at + step]
            place = torch.arange(start + at, start + at + few.shape[1], device=q.device)
            parts.append(self.chosen(few, place, k, v, chunks, turn, options))
        return torch.cat(parts, 1)

    def choice(self, q: Tensor, place: Tensor, chunks: Tensor, turn: Turn) -> Tensor:
        """The chunks (H, N, count), in their order, that queries (H, N, D) at places (N,) see."""
        own = place // self.chunk
        scores = turn(q[None], -place[None])[0] @ chunks.mT  # (H, N, c)
        scores = torch.nn.functional.pad(scores, (0, max(int(own.max()) + 1 - scores.shape[2], 0)))
        number = torch.arange(scores.shape[2], device=q.device)
        always = (number == 0) | (number == own[:, None]) | (number == own[:, None] - 1)
        scores = scores.masked_fill(always, float("inf")).masked_fill(number > own[:, None], float("-inf"))
        order = scores.sort(dim=2, descending=True, stable=True).indices  # of equals the earlier
        return order[..., : self.count].sort(2).values

    def chosen(
        self, q: Tensor, place: Tensor, k: Tensor, v: Tensor, chunks: Tensor, turn: Turn, options: dict[str, Any]
    ) -> Tensor:
        """Attention of queries (H, N, D), each to chunks of its own, moved together."""
        (heads, num, dim), within = q.shape, torch.arange(self.chunk, device=q.device)
        chunk = self.choice(q, place, chunks, turn)
        token = (chunk.unsqueeze(3) * self.chunk + within).flatten(2)  # (H, N, reach)
        seen = token <= place[:, None]
        token = token.clamp_max(k.shape[1] - 1)
        head = torch.arange(heads, device=q.device)[:, None, None] // (heads // k.shape[0])
        moved = torch.arange(self.reach, device=q.device) - token  # of keys, to their places side by side
        keys = turn(k[head, token].flatten(0, 1).unsqueeze(1), moved.flatten(0, 1))
        keys = keys.view(heads, num, self.reach, dim).transpose(0, 1)  # (N, H, reach, D)
        to = (self.count - 1) * self.chunk + place % self.chunk - place
        one = turn(q[None], to[None])[0].transpose(0, 1).unsqueeze(2)  # (N, H, 1, D)
        pattern = boolean_mask(seen.transpose(0, 1).unsqueeze(2))
        return attend(one, keys, v[head, token].transpose(0, 1), pattern, **options).squeeze(2).transpose(0, 1)

    def select(self, entries: Tensor) -> None:
        super().select(entries)
        for name in ("texts", "after"):
            texts = getattr(self, name)
            if texts is not None:
                setattr(self, name, [texts[entry] for entry in entries.tolist()])
