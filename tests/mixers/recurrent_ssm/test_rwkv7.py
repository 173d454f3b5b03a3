"""RWKV-7's time mixing, token by token."""

from __future__ import annotations

import torch
from tests.support.linear_text import DIM, HEADS, make, tokens
from tests.support.rwkv_formulas import rwkv7_formula
from torch.testing import assert_close

from foveate.mixers.recurrent_ssm.rwkv7 import RWKV7


def test_rwkv7_is_its_formula() -> None:
    mixer, x = make(RWKV7, heads=HEADS, rank=3), tokens()
    assert_close(mixer(x), rwkv7_formula(mixer, x))


def test_rwkv7_keeps_its_state_bounded() -> None:
    mixer, x = RWKV7(DIM, HEADS), 3 * torch.randn(1, 3000, DIM)
    with torch.no_grad():
        _, state = mixer.prefill(x, mixer.init_state(1))
    assert state.matrix.isfinite().all() and state.matrix.abs().max() < 1e4
