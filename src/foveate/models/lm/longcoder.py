"""LongCoder: a causal language model of code whose tokens see a window, memory tokens and bridge tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from foveate.attention import attend_partial, merge
from foveate.attention.partial import Partial
from foveate.cache import KVCache, Tokens
from foveate.catalogue.tiers import Preset, model
from foveate.mixers.base import StepOutput, divided, join_heads, split_heads
from foveate.patterns import boolean_mask, causal, window
from foveate.patterns.rules.decided import Columns
from foveate.patterns.rules.earlier import Earlier


class LayerState(NamedTuple):
    """Of one layer: the window's keys, those of memory tokens (and which batch entries have one), of bridges, and the
    tokens (B, r, C) since the last bridge."""

    recent: KVCache
    memory: Tokens
    bridges: Tokens
    segment: Tensor


class DecodingState(NamedTuple):
    layers: list[LayerState]
    seen: int
    where: Tensor  # (kept memory tokens,) positions
    marked: Tensor  # (B, kept memory tokens) whose entries they are


class BridgedAttention(nn.Module):
    """Tokens see the last ``window`` before them and every earlier memory token and bridge; a bridge its own segment
    and earlier bridges, by projections of its own."""

    def __init__(self, dim: int, heads: int, window: int, bridge: int | None, last: bool) -> None:
        super().__init__()
        self.heads, self.window, self.bridge, self.last = heads, window, bridge, last
        divided(dim, heads)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        if bridge is not None and not last:  # nobody reads what bridges are after the last layer
            self.bridge_query, self.bridge_key, self.bridge_value = (nn.Linear(dim, dim) for _ in range(3))

    def split(self, x: Tensor) -> Tensor:
        return split_heads(x, self.heads)

    def joined(self, *parts: Partial) -> Tensor:
        return self.out(join_heads(merge(parts).out))

    def forward(self, x: Tensor, bridges: Tensor | None, memory: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens x (B, N, C), bridges (B, N // bridge, C), marks of memory tokens (B, N)."""
        q, k, v = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        near = (window(self.window, 0) | Columns.of(memory.unsqueeze(1))) & causal
        parts = [attend_partial(q, k, v, near)]
        if bridges is None or self.bridge is None:
            return self.joined(*parts), None
        if bridges.shape[1]:
            ends = torch.arange(1, bridges.shape[1] + 1, device=x.device) * self.bridge - 1
            keys, values = self.split(self.key(bridges)), self.split(self.value(bridges))
            parts.append(attend_partial(q, keys, values, Earlier(ends)))
        if self.last:
            return self.joined(*parts), None
        segments = x[:, : bridges.shape[1] * self.bridge].unflatten(1, (bridges.shape[1], self.bridge))
        return self.joined(*parts), self.over_segments(bridges, segments, bridges)

    def over_segments(self, bridges: Tensor, segments: Tensor, before: Tensor) -> Tensor:
        """The last bridges (B, n, C) of those ``before``, each over its own segment (B, n, r, C)."""
        q = self.split(self.bridge_query(bridges))
        own_k, own_v = (self.split(layer(segments.flatten(0, 1))) for layer in (self.bridge_key, self.bridge_value))
        alone = q.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (B n, H, 1, D)
        out, lse = attend_partial(alone, own_k, own_v)
        assert lse is not None
        shape = bridges.shape[:2]
        own = Partial(*(one.unflatten(0, shape).squeeze(3).transpose(1, 2) for one in (out, lse)))
        k, v = self.split(self.bridge_key(before)), self.split(self.bridge_value(before))
        return self.joined(own, attend_partial(q, k, v, causal))


class LongCoderLayer(nn.Module):
    """Attention and an MLP, each with a norm behind the residual, of tokens and of bridges alike."""

    def __init__(self, dim: int, heads: int, hidden: int, window: int, bridge: int | None, last: bool) -> None:
        super().__init__()
        self.attention = BridgedAttention(dim, heads, window, bridge, last)
        self.norm, self.mlp_norm = nn.LayerNorm(dim, eps=1e-5), nn.LayerNorm(dim, eps=1e-5)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor, bridges: Tensor | None, memory: Tensor) -> tuple[Tensor, Tensor | None]:
        mixed, of_bridges = self.attention(x, bridges, memory)
        return self.after(x, mixed), None if of_bridges is None else self.after(bridges, of_bridges)

    def after(self, x: Tensor | None, mixed: Tensor) -> Tensor:
        assert x is not None
        x = self.norm(x + mixed)
        return self.mlp_norm(x + self.fc2(gelu(self.fc1(x))))

    def read(
        self, x: Tensor, bridges: Tensor | None, memory: Tensor, state: LayerState
    ) -> tuple[Tensor, Tensor | None, LayerState]:
        """As ``forward``, and the state after a prompt x (B, N, C), from the state before any token."""
        layer = self.attention
        out, of_bridges = self(x, bridges, memory)
        k, v = layer.split(layer.key(x)), layer.split(layer.value(x))
        recent, kept, own, rest = state.recent.append(k, v).trimmed(), state.memory, state.bridges, x[:, :0]
        if (columns := memory.any(0)).any():
            kept = kept.append(k[:, :, columns], v[:, :, columns])
        if bridges is not None and layer.bridge is not None:
            if bridges.shape[1]:
                own = own.append(
                    layer.split(layer.key(bridges)), layer.split(layer.value(bridges)), bridges.unsqueeze(1)
                )
            rest = rest if layer.last else x[:, bridges.shape[1] * layer.bridge :]
        return out, of_bridges, LayerState(recent, kept, own, rest)

    def step(
        self, x: Tensor, bridge: Tensor | None, state: LayerState, where: Tensor, marked: Tensor, new: Tensor, seen: int
    ) -> tuple[Tensor, Tensor | None, LayerState]:
        """One token x (B, 1, C), and the bridge (B, 1, C) that comes behind it if one does.

        ``where`` and ``marked`` tell of the memory tokens kept, ``new`` (B,) of this one, the token at ``seen``.
        """
        layer = self.attention
        q, k, v = (layer.split(one(x)) for one in (layer.query, layer.key, layer.value))
        recent = state.recent.append(k, v)
        sees = recent.last_under(window(layer.window, 0) & causal).single
        assert sees is not None
        parts = [attend_partial(q, recent.k[:, :, slice(*sees)], recent.v[:, :, slice(*sees)])]
        far = marked[:, : len(where)] & (where < seen - layer.window)
        if far.any():
            of_memory, values = state.memory.tensors
            parts.append(attend_partial(q, of_memory, values, boolean_mask(far[:, None, None])))
        memory = state.memory.append(k, v) if new.any() else state.memory
        segment, bridges, of_bridge = torch.cat([state.segment, x], 1), state.bridges, None
        if bridge is not None:
            bridges = bridges.append(
                *(layer.split(one(bridge)) for one in (layer.key, layer.value)), bridge.unsqueeze(1)
            )
            before = bridges.tensors[2].squeeze(1)
            if not layer.last:
                of_bridge = self.after(bridge, layer.over_segments(bridge, segment.unsqueeze(1), before))
            segment = segment[:, :0]
        if bridges.length:
            parts.append(attend_partial(q, bridges.tensors[0], bridges.tensors[1]))
        kept = segment[:, :0] if layer.bridge is None or layer.last else segment
        return self.after(x, layer.joined(*parts)), of_bridge, LayerState(recent.trimmed(), memory, bridges, kept)


class LongCoder(nn.Module):
    """Tokens (B, N) to logits of the next one (B, N, vocabulary).

    ``memory`` (B, N) marks memory tokens; by default they are the tokens of ``memory_ids``.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        window: int,
        bridge: int | None,
        memory_ids: tuple[int, ...],
        length: int,
    ) -> None:
        super().__init__()
        self.bridge, self.memory_ids, self.length, self.window = bridge, memory_ids, length, window
        self.embed, self.places = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.bridge_token = None if bridge is None else nn.Parameter(torch.empty(1, 1, dim))
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.layers = nn.ModuleList(
            LongCoderLayer(dim, heads, hidden, window, bridge, last=number == depth - 1) for number in range(depth)
        )
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, memory: Tensor | None = None) -> Tensor:
        x, bridges = self.embedded(tokens, 0)
        memory = self.marks(tokens, memory)
        for layer in self.layers:
            x, bridges = layer(x, bridges, memory)
        return x @ self.embed.weight.mT

    def embedded(self, tokens: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
        """Tokens from position ``first`` on, and the bridges behind those that end a segment."""
        end = first + tokens.shape[1]
        if end > self.length:
            raise ValueError(f"the model has {self.length} positions; got {end} tokens: build it with a larger length")
        at = torch.arange(first, end, device=tokens.device)
        x = self.norm(self.embed(tokens) + self.places(at))
        if self.bridge is None or self.bridge_token is None:
            return x, None
        ends = at[(at + 1) % self.bridge == 0]
        return x, self.norm(self.bridge_token + self.places(ends)).expand(len(tokens), -1, -1)

    def marks(self, tokens: Tensor, memory: Tensor | None) -> Tensor:
        if memory is None:
            return torch.isin(tokens, torch.tensor(self.memory_ids, device=tokens.device, dtype=tokens.dtype))
        if memory.dtype != torch.bool or memory.shape != tokens.shape:
            raise ValueError(
                f"memory marks tokens, boolean {tuple(tokens.shape)}; got {memory.dtype} {tuple(memory.shape)}"
            )
        return memory

    # ---- decoding: the window's keys, those of memory tokens and those of bridges --------------------------------

    def init_state(self, batch: int, capacity: int | None = None) -> DecodingState:
        """The state before the first token; it grows by memory tokens and bridges alone once the window is full."""
        weight = self.embed.weight
        near = window(self.window, 0) & causal
        empty = weight.new_empty(batch, 0, weight.shape[1])
        layers = [LayerState(KVCache(batch, capacity, near), Tokens(batch), Tokens(batch), empty) for _ in self.layers]
        where = torch.empty(0, dtype=torch.long, device=weight.device)
        return DecodingState(layers, 0, where, where.new_empty(batch, 0, dtype=torch.bool))

    def prefill(self, tokens: Tensor, state: DecodingState, memory: Tensor | None = None) -> StepOutput:
        """Logits of the next tokens (B, N), and the state after them: a prompt at once, what follows one by one."""
        marks, outs = self.marks(tokens, memory), []
        if not state.seen and tokens.shape[1]:
            return self.read(tokens, marks, state)
        for at in range(tokens.shape[1]):
            out, state = self.decode(tokens[:, at : at + 1], state, marks[:, at : at + 1])
            outs.append(out)
        empty = self.embed.weight.new_empty(len(tokens), 0, self.embed.num_embeddings)
        return StepOutput(torch.cat([empty, *outs], 1), state)

    def read(self, tokens: Tensor, marks: Tensor, state: DecodingState) -> StepOutput:
        """A prompt, from the state before any token."""
        x, bridges = self.embedded(tokens, 0)
        layers = []
        for layer, own in zip(self.layers, state.layers, strict=True):
            x, bridges, own = layer.read(x, bridges, marks, own)  # type: ignore[operator]
            layers.append(own)
        where = marks.any(0).nonzero().squeeze(1)
        return StepOutput(x @ self.embed.weight.mT, DecodingState(layers, tokens.shape[1], where, marks[:, where]))

    def decode(self, tokens: Tensor, state: DecodingState, memory: Tensor | None = None) -> StepOutput:
        """Logits of one more token (B, 1)."""
        new = self.marks(tokens, memory)[:, 0]
        x, bridges = self.embedded(tokens, state.seen)
        bridge = bridges if bridges is not None and bridges.shape[1] else None
        layers = []
        for layer, own in zip(self.layers, state.layers, strict=True):
            x, bridge, own = layer.step(x, bridge, own, state.where, state.marked, new, state.seen)  # type: ignore[operator]
            layers.append(own)
        where, marked = state.where, state.marked
        if new.any():
            where = torch.cat([where, where.new_tensor([state.seen])])
            marked = torch.cat([marked, new.unsqueeze(1)], 1)
        return StepOutput(x @ self.embed.weight.mT, DecodingState(layers, state.seen + 1, where, marked))


@model(
    "longcoder",
    papers=("LongCoder",),
    inputs="tokens",
    presets={"base": Preset({}, 150e6)},
    tiny={
        "vocabulary": 16,
        "dim": 24,
        "depth": 2,
        "heads": 2,
        "hidden": 40,
        "window": 4,
        "bridge": 5,
        "memory_ids": (3, 7),
        "length": 64,
    },
    supports={"decode"},
)
def longcoder(
    vocabulary: int = 51_416,
    *,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    hidden: int = 3072,
    window: int = 512,
    bridge: int | None = 256,
    memory_ids: tuple[int, ...] = (),
    length: int = 4096,
) -> LongCoder:
    """LongCoder: code completed with a window, memory tokens that all later ones see, and bridges between segments.

    A token sees the ``window`` tokens before it, every earlier memory token (line ends of imports and definitions in
    the paper, marked by the caller or given by ``memory_ids``) and every bridge so far. Bridges come behind every
    ``bridge`` tokens; each reads its own segment and all earlier bridges, by query, key and value projections of its
    own, and is read by those of tokens. N (w + b + m) pairs. None for ``bridge`` leaves bridges out.

    The authors' code is followed, which lets memory tokens themselves read no more than others do. Theirs reads one
    token more than a segment at each bridge.

    Guo, Xu, Duan, Yin, McAuley, LongCoder: A Long-Range Pre-trained Language Model for Code Completion,
    arXiv 2306.14893.

    >>> model = longcoder(50, dim=32, depth=2, heads=4, hidden=48, window=8, bridge=6, memory_ids=(10,))
    >>> model(torch.randint(50, (2, 19))).shape
    torch.Size([2, 19, 50])
    """
    sizes = {"dim": dim, "depth": depth, "heads": heads, "hidden": hidden, "window": window, "length": length}
    return LongCoder(vocabulary, bridge=bridge, memory_ids=memory_ids, **sizes)


def important_lines(code: str) -> list[int]:
    """Where lines of Python that import or define something end: offsets of their newlines, for memory tokens.

    >>> important_lines("import re\\nx = 1\\ndef f(x):\\n    return x\\n")
    [9, 25]
    """
    found, at = [], 0
    for line in code.splitlines(keepends=True):
        at += len(line)
        if line.lstrip().startswith(("import ", "from ", "def ", "class ", "async def ")) and line.endswith("\n"):
            found.append(at - 1)
    return found
