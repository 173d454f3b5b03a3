"""What a time-invariant state space does to tokens as a whole: its impulse response, and convolution with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kernel(transition: Tensor, weights: Tensor, length: int) -> Tensor:
    """The impulse response 2 Re(sum_s weights_s exp(l transition_s)) for l < length, (C, length), real.

    >>> kernel(torch.tensor([[0.5]]).log() + 0j, torch.ones(1, 1) + 0j, 3)
    tensor([[2.0000, 1.0000, 0.5000]])
    """
    side = math.isqrt(max(0, length - 1)) + 1  # l is a coarse step and a fine one: powers of 2 sqrt(L) ages suffice
    ages = torch.arange(side, device=transition.device)
    fine = powers(transition, ages)  # (C, S, side)
    coarse = weights.unsqueeze(-1) * powers(transition, side * ages)
    return 2 * (coarse.mT @ fine).real.flatten(1)[:, :length]


def remembered(x: Tensor, transition: Tensor) -> Tensor:
    """What states hold of x (B, N, C) after it: sum_t exp((N - 1 - t) transition) x_t, (B, C, S)."""
    batch, length, channels = x.shape
    side = math.isqrt(max(0, length - 1)) + 1
    front = x.new_zeros(batch, side * side - length, channels)
    blocks = torch.cat([front, x], dim=1).mT.unflatten(2, (side, side))  # (B, C, coarse, fine)
    ages = torch.arange(side - 1, -1, -1, device=x.device)
    fine = powers(transition, ages)  # (C, S, side)
    inner = blocks.to(transition.dtype) @ fine.mT  # (B, C, coarse, S)
    return (inner * powers(transition, side * ages).mT).sum(2)


def powers(transition: Tensor, ages: Tensor | int) -> Tensor:
    """exp(ages transition), (..., len(ages)); ages turn fast states round thousands of times, too far for float32."""
    exact = transition if transition.device.type == "mps" else transition.to(torch.complex128)
    exact = exact if isinstance(ages, int) else exact.unsqueeze(-1)
    return (exact * ages).exp().to(transition.dtype)


def fft_conv(x: Tensor, filters: Tensor) -> Tensor:
    """Convolve each channel of x (B, N, C) with its causal filter (C, L); nothing wraps round.

    >>> fft_conv(torch.tensor([1.0, 0.0, 2.0]).view(1, 3, 1), torch.tensor([[1.0, 0.5]])).flatten()
    tensor([1.0000, 0.5000, 2.0000])
    """
    length = x.shape[1]
    size = length + min(length, filters.shape[1])
    spectrum = torch.fft.rfft(x, n=size, dim=1) * torch.fft.rfft(filters[:, :length].mT, n=size, dim=0)
    return torch.fft.irfft(spectrum, n=size, dim=1)[:, :length]
