"""Latent attention whose cache is compressed in time as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.attention import Partial, attend_partial, merge
from foveate.cache.tokens import Tokens
from foveate.catalogue.registry import register
from foveate.layers.rotary import rotate
from foveate.mixers.base import Mixer, StepOutput
from foveate.patterns import Layout, causal


@dataclass(frozen=True)
class LatentState:
    """Whole chunks (B, 1, n // s, r + R) of a text of ``seen`` tokens, and the sum (B, r) of the chunk begun."""

    chunks: Tokens
    begun: Tensor | None
    seen: int = 0


@register(
    "mtla",
    papers=("MTLA",),
    formula="ĉ_n = Σ_{i ≤ n, ⌊i/s⌋=⌊n/s⌋} σ(W_p pe_⌊i/s⌋ · W_c c_i) c_i;  o_m = Σ_n softmax_n((q_m·W_k ĉ_n + "
    "q^R_m·k^R_n) / √d) W_v ĉ_n over n = m and n < m with s | n + 1",
    supports={"causal", "decode", "padding", "packed"},
)
class MTLA(Mixer):
    """Multi-head temporal latent attention: of every ``stride`` tokens the cache keeps one latent vector of ``rank``.

    As in multi-head latent attention, keys and values of all heads come from a normalised latent vector and a rotary
    key that heads share. Latents of neighbours are added up, each weighted by a sigmoid of its product with the
    position of its chunk (a hyper-network). A token sees the whole chunks before its own, and of its own chunk the sum
    up to itself, whose rotary key is its own: so training equals decoding, where that sum is updated in place.

    Deng, Woodland, Multi-head Temporal Latent Attention, arXiv 2505.13544; sizes by default are those of the authors'
    code, whose rotary channels are paired as neighbours, while here c goes with c + rope_dim / 2.
    """

    tiny: ClassVar[dict[str, Any]] = {"rank": 8, "nope_dim": 5, "rope_dim": 4, "value_dim": 3, "stride": 3}
    one_by_one: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        rank: int = 256,
        stride: int = 2,
        nope_dim: int = 64,
        rope_dim: int = 32,
        value_dim: int = 64,
        query_rank: int | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__(dim, causal=causal)
        sizes = (heads, rank, stride, nope_dim, rope_dim, value_dim, 1 if query_rank is None else query_rank)
        if any(size < 1 for size in sizes) or rank < 4 or rope_dim % 2:
            raise ValueError(f"sizes are 1 or more, rank 4 or more, rope_dim even; got {sizes}")
        self.heads, self.rank, self.stride = heads, rank, stride
        self.nope_dim, self.rope_dim, self.value_dim = nope_dim, rope_dim, value_dim
        width = heads * (nope_dim + rope_dim)
        self.to_q: nn.Module = nn.Linear(dim, width, bias=False)
        if query_rank is not None:
            down, up = nn.Linear(dim, query_rank, bias=False), nn.Linear(query_rank, width, bias=False)
            self.to_q = nn.Sequential(down, nn.LayerNorm(query_rank), up)
        self.to_latent = nn.Linear(dim, rank + rope_dim, bias=False)
        self.norm = nn.LayerNorm(rank)
        self.to_kv = nn.Linear(rank, heads * (nope_dim + value_dim), bias=False)
        self.to_out = nn.Linear(heads * value_dim, dim, bias=False)
        self.of_chunk, self.of_token = nn.Linear(rank, rank // 4), nn.Linear(rank, rank // 4)

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        return self.mix_after(x, self.empty_state(x.shape[0], None)).out

    def empty_state(self, batch: int, capacity: int | None) -> LatentState:
        room = None if capacity is None else capacity // self.stride
        return LatentState(Tokens(batch, room), None)

    def mix_after(self, x: Tensor, state: LatentState) -> StepOutput:
        lead = state.seen % self.stride  # tokens of the chunk begun
        place = torch.arange(state.seen, state.seen + x.shape[1], device=x.device)
        latent, k_rope = self.to_latent(x).split([self.rank, self.rope_dim], 2)
        k_rope = rotate(k_rope.unsqueeze(1), place).squeeze(1)
        sums = self.sums(self.weighed(self.norm(latent), place), lead, state.begun)  # (B, N, r)
        keys = torch.cat([sums, k_rope], 2).unsqueeze(1)  # (B, 1, N, r + R)
        ends = slice(self.stride - 1 - lead, None, self.stride)
        chunks = state.chunks.append(keys[:, :, ends]) if keys[:, :, ends].shape[2] else state.chunks
        seen = state.seen + x.shape[1]
        out = self.attend(self.queries(x, place), keys, chunks, lead, state.seen // self.stride)
        kept = sums[:, -1] if x.shape[1] else state.begun
        if kept is not None and seen % self.stride == 0:
            kept = torch.zeros_like(kept)
        return StepOutput(out, LatentState(chunks, kept, seen))

    # ---- the compressed latents ----------------------------------------------------------------------------------

    def weighed(self, latent: Tensor, place: Tensor) -> Tensor:
        """Latents (B, N, r), each times its weight in its chunk."""
        chunk = self.of_chunk(chunk_positions(place // self.stride, self.rank).to(latent.dtype))  # (N, r / 4)
        return latent * torch.sigmoid((self.of_token(latent) * chunk).sum(2, keepdim=True))

    def sums(self, weighed: Tensor, lead: int, begun: Tensor | None) -> Tensor:
        """Of each token the sum of its chunk up to it; ``begun`` is that of ``lead`` tokens before the first."""
        if lead:
            assert begun is not None
            before = torch.nn.functional.pad(begun.unsqueeze(1), (0, 0, lead - 1, 0))
            weighed = torch.cat([before.to(weighed.dtype), weighed], 1)
        count = weighed.shape[1]
        padded = torch.nn.functional.pad(weighed, (0, 0, 0, -count % self.stride))
        return padded.unflatten(1, (-1, self.stride)).cumsum(2).flatten(1, 2)[:, lead:count]

    # ---- attention -----------------------------------------------------------------------------------------------

    def queries(self, x: Tensor, place: Tensor) -> Tensor:
        """Queries (B, H, N, r + R) that meet latents: multiplied by the heads' key matrices."""
        q = self.to_q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        plain, rope = q.split([self.nope_dim, self.rope_dim], 3)
        to_k = self.to_kv.weight.unflatten(0, (self.heads, -1))[:, : self.nope_dim]  # (H, d, r)
        return torch.cat([plain @ to_k, rotate(rope, place)], 3)

    def attend(self, q: Tensor, keys: Tensor, chunks: Tokens, lead: int, before: int) -> Tensor:
        """Tokens out (B, N, C) of queries with keys of their own, after ``before`` whole chunks and ``lead`` tokens."""
        scale = (self.nope_dim + self.rope_dim) ** -0.5
        logit = (q * keys).sum(3) * scale
        values = keys[..., : self.rank]
        parts = [Partial(values.expand(-1, self.heads, -1, -1), logit)]
        far = self.earlier(q, chunks, lead, before, scale)
        joined = merge(parts if far is None else [*parts, far]).out
        to_v = self.to_kv.weight.unflatten(0, (self.heads, -1))[:, self.nope_dim :]  # (H, Dv, r)
        return self.to_out((joined @ to_v.mT).transpose(1, 2).flatten(2))

    def earlier(self, q: Tensor, chunks: Tokens, lead: int, before: int, scale: float) -> Partial | None:
        """Attention to the whole chunks before each query's own; None where there are none."""
        count = q.shape[2]
        first = min(-lead % self.stride, count)  # queries of the chunk begun
        middle = (count - first) // self.stride
        if before + (first > 0) + middle < 1 or not count or not chunks.length:
            return None
        keys = chunks.tensors[0]
        after = before + (lead > 0)  # chunks before the first that begins here
        end = first + middle * self.stride
        parts = [self.all_of(q[:, :, :first], keys[:, :, :before], scale)]
        if middle:
            parts.append(self.triangle(q[:, :, first:end], keys, after, scale))
        parts.append(self.all_of(q[:, :, end:], keys[:, :, : after + middle], scale))
        lse = [part.lse for part in parts if part.lse is not None]
        return Partial(torch.cat([part.out for part in parts], 2), torch.cat(lse, 2))

    def all_of(self, q: Tensor, keys: Tensor, scale: float) -> Partial:
        return attend_partial(q, keys, keys[..., : self.rank], scale=scale)

    def triangle(self, q: Tensor, keys: Tensor, after: int, scale: float) -> Partial:
        """Queries of whole chunks, side by side as if they were heads: of chunk c each sees ``after + c`` keys."""
        rows = q.shape[2] // self.stride
        known = keys[:, :, : after + rows - 1]
        folded = q.unflatten(2, (rows, self.stride)).transpose(2, 3).flatten(1, 2)
        far = attend_partial(folded, known, known[..., : self.rank], causal, scale=scale)
        out, lse = (
            x.unflatten(1, (self.heads, self.stride)).transpose(2, 3).flatten(2, 3) for x in far if x is not None
        )
        return Partial(out, lse)

    def state_bytes(self, n: int) -> int:
        numbers = n // self.stride * (self.rank + self.rope_dim) + self.rank
        return numbers * self.to_latent.weight.element_size()


def chunk_positions(number: Tensor, dim: int) -> Tensor:
    """Sines and cosines (N, dim), by turns, of chunks' numbers (N,).

    >>> chunk_positions(torch.tensor([0]), 4)
    tensor([[0., 1., 0., 1.]], dtype=torch.float64)
    """
    angle = number.unsqueeze(1) * 10_000.0 ** (-torch.arange(0, dim, 2, device=number.device).double() / dim)
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :dim]
