"""Numbers of keys and values as codes of 8, 4 or 2 bits, with scales by channel and by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.precision import accum_dtype

BITS = {"int8": 8, "int4": 4, "int2": 2}
FLOAT8 = torch.float8_e4m3fn
FORMATS = (*BITS, "fp8")
GREATEST = 448.0  # that FLOAT8 has
SCALE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Scale(NamedTuple):
    """x = code * step + least; without ``least`` x = code * step."""

    step: Tensor
    least: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """The numbers that codes (or numbers made of them) stand for."""
        made = x * self.step.to(x.dtype)
        return made if self.least is None else made + self.least.to(x.dtype)

    def map(self, change: Callable[[Tensor], Tensor]) -> Scale:
        """With step and least changed alike."""
        return Scale(change(self.step), None if self.least is None else change(self.least))


@dataclass(frozen=True, eq=False)
class Codes:
    """Numbers (..., S, C) of tokens in few bits: x = channel.of(token.of(code)), either scale left out if None.

    ``data`` (..., S, bytes) uint8 holds ``8 // bits`` channels to a byte, C / 8 * bits apart (`pack`), or is
    (..., S, C) of torch.float8_e4m3fn. A ``channel`` scale, (..., S / group rounded up, C), is that of ``group``
    tokens one after the other; a ``token`` scale is (..., S).
    """

    data: Tensor
    dim: int  # C
    bits: int
    channel: Scale | None = None
    token: Scale | None = None
    group: int | None = None  # None: all tokens

    def __post_init__(self) -> None:
        if self.bits not in BITS.values():
            raise ValueError(f"codes have 8, 4 or 2 bits; got {self.bits}")
        size = self.dim if self.is_float else -(-self.dim * self.bits // 8)
        if self.data.dtype not in (torch.uint8, FLOAT8) or self.data.dim() < 2 or self.data.shape[-1] != size:
            raise ValueError(
                f"codes of {self.dim} channels in {self.bits} bits are (..., S, {size}) of uint8 or {FLOAT8};"
                f" got {tuple(self.data.shape)} of {self.data.dtype}"
            )
        tokens, groups = self.data.shape[:-1], -(-self.data.shape[-2] // self.group) if self.group else 1
        for name, scale, shape in (
            ("channel", self.channel, (*tokens[:-1], groups, self.dim)),
            ("token", self.token, tokens),
        ):
            for x in scale or ():
                if x is not None and (tuple(x.shape) != tuple(shape) or x.dtype not in SCALE_DTYPES):
                    raise ValueError(f"a {name} scale is {tuple(shape)} of floats; got {tuple(x.shape)} of {x.dtype}")

    @property
    def is_float(self) -> bool:
        return self.data.dtype is FLOAT8

    @property
    def shape(self) -> torch.Size:
        """Of the numbers, (..., S, C)."""
        return torch.Size((*self.data.shape[:-1], self.dim))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Codes and scales."""
        return (self.data, *(x for scale in (self.channel, self.token) for x in scale or () if x is not None))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(x.nbytes for x in self.tensors)

    def at(self, index: Any) -> Codes:
        """Those at an index into the dims before tokens and channels."""
        channel, token = (None if s is None else s.map(lambda x: x[index]) for s in (self.channel, self.token))
        return replace(self, data=self.data[index], channel=channel, token=token)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """The numbers (..., S, C), computed in float32 at least."""
        precise = accum_dtype(dtype)
        codes = self.data if self.is_float else unpack(self.data, self.bits, self.dim)
        x = codes.to(precise)
        if self.token is not None:
            x = self.token.map(lambda s: s.unsqueeze(-1)).of(x)
        if self.channel is not None:
            tokens = x.shape[-2]
            x = self.channel.map(lambda s: _spread(s, self.group or tokens, tokens)).of(x)
        return x.to(dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., C) below 2 ** bits, ``8 // bits`` channels to a byte, C / 8 * bits apart; bits is 2, 4 or 8.

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


def quantise(x: Tensor, format: str = "int8", *, by: str = "token", group: int | None = None) -> Codes:
    """Keys or values (..., S, C) in a format "int8", "int4", "int2" or "fp8", rounded to nearest.

    Integers have a step and a least value, of each token (``by="token"``) or of each channel over every ``group``
    tokens (``by="channel"``; None: over all of them); "fp8", torch.float8_e4m3fn, has a step alone. Keys are best by
    channel, whose outliers keep to their channels, values by token: Liu et al., KIVI: A Tuning-Free Asymmetric 2bit
    Quantization for KV Cache, arXiv 2402.02750. Scales have the dtype of x. All numbers must be finite.

    >>> x = torch.randn(2, 100, 64)
    >>> codes = quantise(x, "int4", by="channel", group=32)
    >>> codes.data.shape, codes.channel.step.shape
    (torch.Size([2, 100, 32]), torch.Size([2, 4, 64]))
    >>> bool(((codes.numbers(x.dtype) - x).abs() <= codes.channel.step.max() / 2 + 1e-5).all())
    True

    Raises ValueError for another format, and for a group of tokens by token.
    """
    if format not in FORMATS or by not in ("token", "channel"):
        raise ValueError(f"format is one of {', '.join(FORMATS)}, by token or channel; got {format!r}, {by!r}")
    if group is not None and (by == "token" or group < 1):
        raise ValueError(f"group is a number of tokens that have a scale by channel; got {group} by {by}")
    bits = BITS.get(format, 8)
    if by == "token":
        scale = _scale(x, -1, format)
        codes = _codes(x, scale.map(lambda s: s.unsqueeze(-1)), format)
        return Codes(codes, x.shape[-1], bits, token=scale)
    tokens = x.shape[-2]
    size = group or max(tokens, 1)
    whole = torch.nn.functional.pad(x, (0, 0, 0, -tokens % size))
    if tokens % size:  # filled up by a token of the same group
        whole[..., tokens:, :] = x[..., -1:, :]
    scale = _scale(whole.unflatten(-2, (-1, size)), -2, format)
    each = scale.map(lambda s: _spread(s, size, tokens))
    return Codes(_codes(x, each, format), x.shape[-1], bits, channel=scale, group=group)


def _scale(x: Tensor, axis: int, format: str) -> Scale:
    """That of numbers along an axis."""
    if format == "fp8":
        return Scale(x.abs().amax(axis) / GREATEST)
    least, most = x.amin(axis), x.amax(axis)
    return Scale((most - least) / (2 ** BITS[format] - 1), least)


def _codes(x: Tensor, scale: Scale, format: str) -> Tensor:
    step = torch.where(scale.step > 0, scale.step, torch.ones_like(scale.step))
    if format == "fp8":
        return (x / step).clamp(-GREATEST, GREATEST).to(FLOAT8)
    bits = BITS[format]
    return pack(((x - scale.least) / step).round().clamp(0, 2**bits - 1).to(torch.uint8), bits)  # type: ignore[operator]


def _spread(scale: Tensor, group: int, tokens: int) -> Tensor:
    """(..., groups, C) as (..., tokens, C)."""
    return scale.repeat_interleave(group, -2)[..., :tokens, :]
