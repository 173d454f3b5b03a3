"""RWKV-4's time mixing against the quotient of sums that the paper writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.linear_text import DIM, make, tokens
from tests.support.rwkv_formulas import before
from torch import Tensor
from torch.testing import assert_close

from foveate.mixers.recurrent_ssm.rwkv4 import RWKV4, weighed_average


def wkv_formula(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
    """The quotient of sums over all pairs, as the paper writes it; overflows for large keys."""
    length = k.shape[1]
    distance = (torch.arange(length)[:, None] - torch.arange(length) - 1).double()
    exponent = distance[..., None] * decay + k.unsqueeze(1)  # (B, N, N, C)
    exponent = torch.where((distance >= 0)[..., None], exponent, -torch.inf)
    own = torch.diag_embed((k + bonus).transpose(1, 2)).permute(0, 2, 3, 1)
    exponent = torch.where(torch.eye(length, dtype=torch.bool)[..., None], own, exponent)
    weights = exponent.exp()
    return (weights * v.unsqueeze(1)).sum(2) / weights.sum(2)


def rwkv4_formula(mixer: Any, x: Tensor) -> Tensor:
    layers = (mixer.to_r, mixer.to_k, mixer.to_v)
    r, k, v = (layer(mu * x + (1 - mu) * before(x)) for layer, mu in zip(layers, mixer.shares, strict=True))
    wkv = wkv_formula(k, v, -mixer.A_log.exp(), mixer.bonus)
    return mixer.to_out(torch.sigmoid(r) * wkv)


def test_rwkv4_is_its_formula() -> None:
    mixer, x = make(RWKV4), tokens()
    assert_close(mixer(x), rwkv4_formula(mixer, x))


def test_weighed_averages_have_the_gradients_of_their_formula() -> None:
    k, v, decay = tokens().requires_grad_(), tokens().requires_grad_(), (-torch.rand(DIM).double()).requires_grad_()
    bonus, towards = torch.randn(DIM, dtype=torch.float64, requires_grad=True), tokens()
    wanted = torch.autograd.grad((wkv_formula(k, v, decay, bonus) * towards).sum(), (k, v, decay, bonus))
    found = torch.autograd.grad((weighed_average(k, v, decay, bonus)[0] * towards).sum(), (k, v, decay, bonus))
    for mine, theirs in zip(found, wanted, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("shift", [-2000.0, 2000.0])
def test_weighed_averages_depend_on_differences_of_keys_alone(shift: float) -> None:
    k, v, decay, bonus = tokens(), tokens(), -torch.rand(DIM).double(), torch.randn(DIM).double()
    assert_close(weighed_average(k + shift, v, decay, bonus)[0], wkv_formula(k, v, decay, bonus))


def test_weighed_averages_of_wild_keys_stay_among_the_values() -> None:
    k, v = 1e4 * torch.randn(2, 70, 5), torch.randn(2, 70, 5)
    out, _ = weighed_average(k, v, -torch.rand(5), torch.randn(5))
    assert out.isfinite().all()
    assert out.abs().max() <= v.abs().max() * (1 + 1e-5)
