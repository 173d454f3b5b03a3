"""RWKV's time mixing token by token."""

from __future__ import annotations

from typing import Any

import torch
from tests.support.linear_text import HEADS, standard
from torch import Tensor

from foveate.mixers.base import join_heads, split_heads


def before(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def normed(mixer: Any, heads: Tensor) -> Tensor:
    return join_heads(standard(heads, 1e-5 * mixer.head_dim)) * mixer.gain + mixer.offset


def rwkv7_parts(mixer: Any, x: Tensor) -> list[Tensor]:
    """Receptance, key, value, decay, unit removal key and its rate, (B, H, N, D, 1) each."""
    move = before(x) - x
    for_r, for_k, for_v, for_decay, for_rate, _ = (x + move * share for share in mixer.shares)
    rate = torch.sigmoid(mixer.to_rate(for_rate))
    decay = torch.exp(-(torch.exp(torch.tensor(-0.5))) * torch.sigmoid(mixer.to_decay(for_decay)))
    r, k, v = mixer.to_r(for_r), mixer.to_k(for_k), mixer.to_v(for_v)
    removal, key = k * mixer.removal, k * (1 + (rate - 1) * mixer.retained)
    parts = [split_heads(y, HEADS).unsqueeze(-1) for y in (r, key, v, decay, removal, rate)]
    parts[4] = parts[4] / parts[4].norm(dim=3, keepdim=True)
    return parts


def rwkv7_formula(mixer: Any, x: Tensor, state: Tensor | None = None) -> Tensor:
    r, key, v, decay, removal, rate = rwkv7_parts(mixer, x)
    state = torch.zeros(x.shape[0], HEADS, 6, 6, dtype=torch.float64) if state is None else state
    outs, stressed = [], []
    for t in range(x.shape[1]):
        turn = torch.diag_embed(decay[:, :, t].squeeze(-1)) - (rate * removal)[:, :, t] @ removal[:, :, t].mT
        state = turn @ state + key[:, :, t] @ v[:, :, t].mT
        outs.append(r[:, :, t].mT @ state)
        stressed.append((r[:, :, t] * mixer.bonus.unsqueeze(-1)).mT @ key[:, :, t] * v[:, :, t].mT)
    out = normed(mixer, torch.cat(outs, 2)) + join_heads(torch.cat(stressed, 2))
    return mixer.to_out(out * mixer.to_gate(x + (before(x) - x) * mixer.shares[-1]))
