"""Keys and values in two or four bits: keys with a scale a channel, values with one a channel and one a token."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from foveate.attention import Partial
from foveate.cache.memory import Look
from foveate.cache.scores import logits_of
from foveate.cache.slots import FREE
from foveate.counting import Cost, counted

CHUNK = 64  # queries that meet packed keys at once


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., D) below 2 ** bits, ``8 // bits`` channels to a byte, D / 8 * bits apart; bits is 2 or 4.

    >>> pack(torch.tensor([[1, 2, 3, 0, 2]], dtype=torch.uint8), 2)
    tensor([[45,  2]], dtype=torch.uint8)
    """
    each = 8 // bits
    planes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each)).chunk(each, -1)
    packed = planes[0].clone()
    for number, plane in enumerate(planes[1:], 1):
        packed |= plane << bits * number
    return packed


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """The codes (..., dim) that `pack` packed.

    >>> unpack(torch.tensor([[45, 2]], dtype=torch.uint8), 2, 5)
    tensor([[1, 2, 3, 0, 2]], dtype=torch.uint8)
    """
    planes = [(packed >> bits * number) & (2**bits - 1) for number in range(8 // bits)]
    return torch.cat(planes, -1)[..., :dim]


@dataclass(frozen=True)
class PackedTokens:
    """Keys and values of some tokens in ``bits`` bits, with their positions; FREE where there is none.

    A key is ``code * k_step + k_least`` of its channel. A value is ``(code * v_step + v_least) * v_norm``: step and
    least of its token, norm of its channel, the root of the largest magnitude there.
    """

    position: Tensor  # (B, G, S) int32
    k: Tensor  # (B, G, S, D / codes a byte) uint8
    k_step: Tensor  # (B, G, 1, D)
    k_least: Tensor
    v: Tensor  # (B, G, S, Dv / codes a byte) uint8
    v_step: Tensor  # (B, G, S, 1)
    v_least: Tensor
    v_norm: Tensor  # (B, G, 1, Dv)
    bits: int

    @staticmethod
    def of(k: Tensor, v: Tensor, position: Tensor, bits: int) -> PackedTokens:
        """Quantise keys (B, G, S, D) and values (B, G, S, Dv) at positions (B, G, S)."""
        there = (position != FREE).unsqueeze(-1)
        k_code, k_step, k_least = _quantised(k, bits, 2, there)
        norm = v.abs().masked_fill(~there, 0.0).amax(2, keepdim=True).sqrt()
        norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        v_code, v_step, v_least = _quantised(v / norm, bits, 3, there)
        packed_k, packed_v = pack(k_code, bits), pack(v_code, bits)
        return PackedTokens(position.int(), packed_k, k_step, k_least, packed_v, v_step, v_least, norm, bits)

    @property
    def nbytes(self) -> int:
        """Codes, scales of both kinds, and positions."""
        return sum(x.nbytes for x in self._tensors)

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, each.name) for each in fields(self)[:-1])

    def select(self, entries: Tensor) -> PackedTokens:
        """Batch entries (B',) of these."""
        index = entries.to(self.k.device)
        return replace(self, **{each.name: getattr(self, each.name)[index] for each in fields(self)[:-1]})

    def dequantised(self) -> tuple[Tensor, Tensor]:
        """Keys (B, G, S, D) and values (B, G, S, Dv) as numbers again."""
        k = unpack(self.k, self.bits, self.k_step.shape[3]).to(self.k_step.dtype)
        v = unpack(self.v, self.bits, self.v_norm.shape[3]).to(self.v_step.dtype)
        return k * self.k_step + self.k_least, (v * self.v_step + self.v_least) * self.v_norm

    @counted("attend", lambda packed, q, look: packed.cost(q, look))
    def attend(self, q: Tensor, look: Look) -> Partial:
        """Attention of queries (B, H, N, D) to these tokens alone, from the codes: scales are applied to q and out."""
        parts = [self._attend(q[:, :, at : at + CHUNK], look, at) for at in range(0, q.shape[2], CHUNK)]
        outs, sums = zip(*parts, strict=True)
        return Partial(torch.cat(outs, 2), torch.cat(sums, 2))

    def cost(self, q: Tensor, look: Look) -> Cost:
        """Operations of `attend`, which reads all codes for every ``CHUNK`` queries."""
        seen = int(look.visible(self.position.long()).sum()) if self.k.shape[2] else 0
        pairs = seen * q.shape[1] // self.k.shape[1]
        channels = q.shape[3] + self.v_norm.shape[3]
        return Cost(2 * channels * pairs, pairs, pairs, self.nbytes * -(-q.shape[2] // CHUNK))

    def _attend(self, q: Tensor, look: Look, at: int) -> tuple[Tensor, Tensor]:
        few = Look(look.position[:, at : at + q.shape[2]], look.options, look.width, slopes=look.slopes)
        dtype = torch.promote_types(q.dtype, torch.float32)
        heads = (self.k.shape[1], q.shape[1] // self.k.shape[1])
        rows = q.to(dtype).unflatten(1, heads).flatten(2, 3)  # (B, G, r N, D)
        codes = unpack(self.k, self.bits, q.shape[3]).to(dtype)
        products = (rows * self.k_step.to(dtype)) @ codes.mT + rows @ self.k_least.to(dtype).mT
        products = products.unflatten(2, (heads[1], -1)).flatten(1, 2)
        logits = logits_of(products, self.position.long(), few, q.shape[3])
        total = torch.cat([logits, torch.full_like(logits[..., :1], float("-inf"))], 3).logsumexp(3)
        weights = (logits - torch.where(total.isinf(), 0.0, total).unsqueeze(3)).exp()
        weights = weights.unflatten(1, heads).flatten(2, 3)
        codes = unpack(self.v, self.bits, self.v_norm.shape[3]).to(dtype)
        out = (weights * self.v_step.to(dtype).mT) @ codes + weights @ self.v_least.to(dtype)
        out = (out * self.v_norm.to(dtype)).unflatten(2, (heads[1], -1)).flatten(1, 2)
        return out.to(q.dtype), total


def _quantised(x: Tensor, bits: int, axis: int, there: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of x, and the step and least value along an axis, of what is there."""
    least = x.masked_fill(~there, float("inf")).amin(axis, keepdim=True)
    most = x.masked_fill(~there, float("-inf")).amax(axis, keepdim=True)
    some = there.expand_as(x).any(axis, keepdim=True)
    least, most = (torch.where(some, one, torch.zeros_like(one)) for one in (least, most))
    step = (most - least) / (2**bits - 1)
    safe = torch.where(step > 0, step, torch.ones_like(step))
    codes = ((x - least) / safe).round().clamp(0, 2**bits - 1)
    return codes.masked_fill(~there, 0.0).to(torch.uint8), step, least
