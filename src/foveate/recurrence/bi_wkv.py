"""Bidirectional WKV: averages over all tokens, by weights that decay with the distance on either side."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.dispatch import Facts, Implementation, Operator, as_it_is, nothing
from foveate.precision import accum_dtype
from foveate.recurrence.linear.stabilise import stabilise
from foveate.recurrence.selective.api import linear_scan


class Call(NamedTuple):
    """What `bi_wkv` was given, in the arithmetic's dtype: k and v (B, N, C), rate and bonus (C,)."""

    k: Tensor
    v: Tensor
    rate: Tensor
    bonus: Tensor


class Side(NamedTuple):
    """Sums over the tokens on one side of each: of weighed values, of weights, and their log-unit, (B, N, C) each."""

    values: Tensor
    weights: Tensor
    unit: Tensor

    def flipped(self) -> Side:
        return Side(*(x.flip(1) for x in self))


def bi_wkv(k: Tensor, v: Tensor, rate: Tensor, bonus: Tensor, *, impl: str = "auto") -> Tensor:
    """Average values over all tokens, channel by channel, in time linear in their number.

        out_t = sum_i exp(a_ti) v_i / sum_i exp(a_ti),    a_ti = k_i - (|t - i| - 1) rate,    a_tt = k_t + bonus

    Duan et al., "Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures",
    arXiv 2403.02308; Yang et al., "Restore-RWKV", arXiv 2407.11087. There rate is w / T for T tokens.

    >>> k, v = torch.randn(2, 1, 100, 6)
    >>> bi_wkv(k, v, torch.rand(6) / 100, torch.zeros(6)).shape
    torch.Size([1, 100, 6])

    Args:
        k, v: (B, N, C).
        rate: (C,), of any sign: weights grow with the distance where it is negative.
        bonus: (C,).
        impl: "reference" (the formula, N x N weights for each channel), "scan" (one linear scan from each side) or
            "auto", the latter.

    Arithmetic is float64 if one of the tensors is and float32 otherwise; the output has v's dtype. No weight
    overflows, whatever the keys. Differentiable in every tensor.
    """
    if k.dim() != 3 or k.shape != v.shape:
        raise ValueError(f"k and v are (batch, length, channels); got {tuple(k.shape)} and {tuple(v.shape)}")
    if rate.shape != k.shape[2:] or bonus.shape != k.shape[2:]:
        wanted, got = tuple(k.shape[2:]), f"{tuple(rate.shape)} and {tuple(bonus.shape)}"
        raise ValueError(f"rate and bonus are one number a channel, {wanted}; got {got}")
    dtype = accum_dtype(k, v, rate, bonus)
    return BI_WKV(Call(*(x.to(dtype) for x in (k, v, rate, bonus))), impl).to(v.dtype)


def _by_pairs(call: Call) -> Tensor:
    k, v, rate, bonus = call
    at = torch.arange(k.shape[1], device=k.device)
    apart = ((at[:, None] - at).abs() - 1).unsqueeze(-1)  # (N, N, 1)
    logits = k.unsqueeze(1) + torch.where(apart < 0, bonus, -apart * rate)  # (B, N, N, C)
    return torch.einsum("btic,bic->btc", logits.softmax(2), v)


def _by_scan(call: Call) -> Tensor:
    k, v, rate, bonus = call
    both = _earlier(torch.cat([k, k.flip(1)]), torch.cat([v, v.flip(1)]), rate)
    before, after = (Side(*parts) for parts in zip(*(x.chunk(2) for x in both), strict=True))
    sides = [before, after.flipped(), Side(v, torch.ones_like(v), k + bonus)]
    unit = torch.stack([side.unit for side in sides]).amax(0).detach()
    scales = [(side.unit - unit).exp() for side in sides]
    total = torch.stack([scale * side.values for scale, side in zip(scales, sides, strict=True)]).sum(0)
    weight = torch.stack([scale * side.weights for scale, side in zip(scales, sides, strict=True)]).sum(0)
    return total / weight


def _earlier(k: Tensor, v: Tensor, rate: Tensor) -> Side:
    """Sums over the tokens before each one.

    A scan can only fade, so the part of a rate that lets weights grow is moved into the keys, by their place, and
    out of the sums again.
    """
    place = torch.arange(k.shape[1], device=k.device, dtype=k.dtype).unsqueeze(-1)  # (N, 1)
    growth = rate.clamp(max=0)
    stable = stabilise((-rate.clamp(min=0)).expand_as(k), k + place * growth, dim=1)
    inputs = torch.cat([stable.weight * v, stable.weight], dim=2)
    sums = linear_scan(inputs, torch.cat([stable.decay] * 2, dim=2)).out
    values, weights = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], dim=1).chunk(2, dim=2)
    return Side(values, weights, stable.before - (place - 1) * growth)


def _no_tokens(call: Call) -> Tensor | None:
    return None if call.v.numel() else call.v


def _described(call: Call) -> Facts:
    return {"tokens": call.k.shape[1], "channels": call.k.shape[2]}


BI_WKV: Operator[Call, Tensor] = Operator(
    "bi_wkv",
    [Implementation("scan", nothing, as_it_is, _by_scan), Implementation("reference", nothing, as_it_is, _by_pairs)],
    describe=_described,
    trivial=_no_tokens,
)
