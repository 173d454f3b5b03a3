"""RWKV-6's time mixing, token by token."""

from __future__ import annotations

from typing import Any

import torch
from tests.support.linear_text import HEADS, make, tokens
from tests.support.rwkv_formulas import before, normed
from torch import Tensor
from torch.nn.functional import silu
from torch.testing import assert_close

from foveate.mixers.base import split_heads
from foveate.mixers.recurrent_ssm.rwkv6 import RWKV6


def rwkv6_formula(mixer: Any, x: Tensor) -> Tensor:
    move = before(x) - x
    inner = torch.tanh(mixer.to_ranks(x + move * mixer.share)).chunk(5, -1)
    shares = [each + rank @ up for each, rank, up in zip(mixer.shares, inner, mixer.to_shares, strict=True)]
    for_r, for_k, for_v, for_decay, for_gate = (x + move * share for share in shares)
    lora = mixer.to_decay
    decay = torch.exp(-torch.exp(torch.tanh(for_decay @ lora.down.weight.T) @ lora.up.weight.T + lora.bias))
    r, k, v = mixer.to_r(for_r), mixer.to_k(for_k), mixer.to_v(for_v)
    r, k, v, decay = (split_heads(y, HEADS).unsqueeze(-1) for y in (r, k, v, decay))  # (B, H, N, D, 1)
    state, outs = torch.zeros(x.shape[0], HEADS, 6, 6, dtype=torch.float64), []
    for t in range(x.shape[1]):
        written = k[:, :, t] @ v[:, :, t].mT
        outs.append(r[:, :, t].mT @ (state + mixer.bonus.unsqueeze(-1) * written))
        state = decay[:, :, t] * state + written
    return mixer.to_out(normed(mixer, torch.cat(outs, 2)) * silu(mixer.to_gate(for_gate)))


def test_rwkv6_is_its_formula() -> None:
    mixer, x = make(RWKV6, heads=HEADS, rank=3, decay_rank=5), tokens()
    assert_close(mixer(x), rwkv6_formula(mixer, x))
