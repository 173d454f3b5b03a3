"""Parts of decoders written out, for the formulas that models are held against."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def turned(x: Tensor, base: float, at: Tensor | None = None) -> Tensor:
    """Channels (c, c + D / 2) of x (..., N, D) turned by n · base^(-2c / D), n the token or what ``at`` (N,) says."""
    width, length = x.shape[-1], x.shape[-2]
    n = torch.arange(length) if at is None else at
    angles = n.unsqueeze(1) * base ** (-2 * torch.arange(width // 2, dtype=torch.float64) / width)
    turns = torch.polar(torch.ones_like(angles), angles)
    made = torch.complex(x[..., : width // 2], x[..., width // 2 : width // 2 * 2]) * turns
    return torch.cat([made.real, made.imag, x[..., width // 2 * 2 :]], -1)


def gated(channels: nn.Module, y: Tensor) -> Tensor:
    """SwiGLU of y by the weights of a layer."""
    gate = y @ channels.gate.weight.T
    return (gate / (1 + torch.exp(-gate)) * (y @ channels.value.weight.T)) @ channels.to_out.weight.T


def in_heads(x: Tensor, weight: Tensor, count: int, repeat: int = 1) -> Tensor:
    """x (B, N, C) times a weight as heads (B, count · repeat, N, D), each ``repeat`` times in a row."""
    return (x @ weight.T).view(*x.shape[:2], count, -1).transpose(1, 2).repeat_interleave(repeat, dim=1)


def louder(model: nn.Module) -> nn.Module:
    """Weights at which attention matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(20)
    return model
