"""Keys and values in two or four bits: keys with a scale a channel, values with one a channel and one a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from foveate.attention import Partial
from foveate.attention.stored import Codes, Scale, Segment, attend_stored, pack
from foveate.cache.memory import Look
from foveate.cache.slots import FREE
from foveate.precision import accum_dtype

CHUNK = 64  # queries that meet packed keys at once


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

    @property
    def codes(self) -> tuple[Codes, Codes]:
        """Keys (B, G, S, D) and values (B, G, S, Dv) as they are stored."""
        token = Scale(self.v_step.squeeze(3), self.v_least.squeeze(3))
        return (
            Codes(self.k, self.k_step.shape[3], self.bits, channel=Scale(self.k_step, self.k_least)),
            Codes(self.v, self.v_norm.shape[3], self.bits, channel=Scale(self.v_norm), token=token),
        )

    def dequantised(self) -> tuple[Tensor, Tensor]:
        """Keys (B, G, S, D) and values (B, G, S, Dv) as numbers again."""
        k, v = self.codes
        return k.numbers(self.k_step.dtype), v.numbers(self.v_step.dtype)

    def seen(self, q: Tensor, look: Look) -> Segment:
        """These tokens as queries (B, H, N, D) see them that come after all of them."""
        return self._whole if sees_all(look) else Segment(*self.codes, bias=self._bias(q, look))

    @cached_property
    def _whole(self) -> Segment:
        return Segment(*self.codes, lengths=(self.position != FREE).sum(2))  # what is FREE lies behind the tokens

    def _bias(self, q: Tensor, look: Look) -> Tensor:
        position = self.position.long()
        bias = look.options_at(position).get("bias")
        seen = look.visible(position).repeat_interleave(q.shape[1] // position.shape[1], dim=1)
        given = torch.zeros((), dtype=accum_dtype(q), device=q.device) if bias is None else bias.to(accum_dtype(q))
        return torch.where(seen, given, float("-inf"))


def sees_all(look: Look) -> bool:
    """Whether queries see all tokens before them, none more than another."""
    return not look.padded and look.width is None and look.options.get("bias") is None


def attend_packed(q: Tensor, groups: Sequence[PackedTokens], look: Look) -> Partial:
    """Attention of queries (B, H, N, D) to packed tokens alone, read as they are packed; all come before them."""
    parts = [_attend(q[:, :, at : at + CHUNK], groups, look, at) for at in range(0, q.shape[2], CHUNK)]
    outs, sums = zip(*parts, strict=True)
    return Partial(torch.cat(outs, 2), torch.cat(sums, 2))


def _attend(q: Tensor, groups: Sequence[PackedTokens], look: Look, at: int) -> Partial:
    few = replace(look, position=look.position[:, at : at + q.shape[2]])
    scale, softcap = (look.options.get(name) for name in ("scale", "softcap"))
    return attend_stored(q, [group.seen(q, few) for group in groups], causal=False, scale=scale, softcap=softcap)


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
