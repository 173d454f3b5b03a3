"""AFA: pairs of complex observations of a noisy linear system, one by one, against the mixer."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.formulas import follows
from torch import Tensor

from foveate.catalogue.registry import mixer

DIM, HEADS, WIDTH, LENGTH = 12, 3, 4, 20


def plus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


def variance(decay: Tensor, process: Tensor, key: Tensor, query: Tensor, apart: int) -> Tensor:
    """∫ e^{2μs} σ² ds from 0 to Δt by Simpson's rule, what is left of the key's noise, and the query's."""
    points = 201
    at = torch.linspace(0, apart, points, dtype=torch.float64)
    weights = torch.ones(points, dtype=torch.float64)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    integral = (weights * torch.exp(2 * decay * at)).sum() * apart / (points - 1) / 3
    return process * integral + key * torch.exp(2 * decay * apart) + query


def formula(layer: torch.nn.Module, x: Tensor, *, is_causal: bool = True) -> Tensor:
    batch, length, _ = x.shape

    def heads_of(linear: torch.nn.Linear) -> Tensor:
        both = x @ linear.weight.T + linear.bias
        return torch.complex(both[..., :DIM], both[..., DIM:]).view(batch, length, HEADS, WIDTH)

    q, k, v = (heads_of(linear) for linear in (layer.to_q, layer.to_k, layer.to_v))
    rows = []
    for b in range(batch):
        for i in range(length):
            for h in range(HEADS):
                decay = (torch.sigmoid(layer.decay[h]) - 1) * 10 / (2 * LENGTH) - 1e-5
                noise = [
                    plus(y[h]) + least
                    for y, least in ((layer.process, 0), (layer.key_noise, 1e-5), (layer.query_noise, 1e-5))
                ]
                nu = plus(layer.tolerance[h]) + 1e-5
                turns = (
                    layer.turns[h]
                    if layer.turns is not None
                    else 10_000.0 ** (-torch.arange(WIDTH // 2) / (WIDTH // 2))
                )
                omega = torch.stack([turns, -turns], -1).flatten() * 10 * 2 * math.pi / (2 * LENGTH)
                scores, carried = [], []
                for j in range(i + 1 if is_causal else length):
                    carry = torch.exp(decay * abs(i - j) + 1j * omega * (i - j))
                    residual = (q[b, i, h] - carry * k[b, j, h]).abs().square().sum()
                    spread = variance(decay, *noise, abs(i - j))
                    precision = 1 / spread / (1 + residual / (nu * WIDTH * spread))
                    scores.append(precision ** (layer.temperature[h] ** 2))
                    carried.append(carry * v[b, j, h])
                total = sum(scores)
                rows.append(sum(s / total * c for s, c in zip(scores, carried, strict=True)))
    out = torch.stack(rows).view(batch, length, DIM)
    return torch.cat([out.real, out.imag], -1) @ layer.to_out.weight.T + layer.to_out.bias


def made(**options: object) -> torch.nn.Module:
    return mixer("adaptive_filter_attention", DIM, heads=HEADS, length=LENGTH, **options).double()


@pytest.mark.paper("AFA", "definition")
@pytest.mark.paper("AFA", "works_when")
@pytest.mark.parametrize(("is_causal", "learn_turns"), [(True, True), (True, False), (False, False)])
def test_it_is_the_pairwise_estimate(is_causal: bool, learn_turns: bool) -> None:
    layer = made(causal=is_causal, learn_turns=learn_turns)
    x = torch.randn(1, 6, DIM, dtype=torch.float64, requires_grad=True)
    follows(layer, lambda: layer(x), lambda: formula(layer, x, is_causal=is_causal), x, rtol=1e-6, atol=1e-6)


@pytest.mark.paper("AFA", "definition")
def test_it_begins_as_published() -> None:
    layer = mixer("adaptive_filter_attention", 128, heads=4)
    for linear in (layer.to_q, layer.to_k, layer.to_v, layer.to_out):
        assert not linear.bias.any()
        assert abs(float(linear.weight.detach().std()) - math.sqrt(2 / 256 / 2)) < 0.004
    assert layer.tolerance.tolist() == layer.temperature.tolist() == [1.0] * 4
    assert layer.turns is None
    assert mixer("adaptive_filter_attention", 128, heads=4, learn_turns=True).turns.shape == (4, 16)


@pytest.mark.paper("AFA", "works_when")
def test_weights_are_precisions_that_sum_to_one() -> None:
    """Values that are the state itself, carried: each estimate is that state."""
    layer = made(causal=False)
    with torch.no_grad():
        layer.to_v.weight.zero_()
        layer.to_v.bias.copy_(torch.cat([torch.ones(DIM), torch.zeros(DIM)]))
        layer.decay.fill_(40.0)  # next to no decay
        layer.rotary.zero_()
        layer.to_out.weight.copy_(torch.eye(DIM, 2 * DIM))
    out = layer(torch.randn(1, 7, DIM, dtype=torch.float64))
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-3)  # e^{-1e-5 Δt}


@pytest.mark.paper("AFA", "works_when")
def test_without_dynamics_and_process_noise_it_converges_to_dot_product_attention() -> None:
    """Keys of one length; ν grows, and τ² with it, so that residuals become small beside ν d V."""
    layer = made()
    x = torch.randn(1, 9, DIM, dtype=torch.float64)
    with torch.no_grad():
        for linear in (layer.to_q, layer.to_k):
            linear.weight[DIM:].zero_()
            linear.weight[:DIM].zero_()
        token = torch.nn.functional.normalize(torch.randn(9, HEADS, WIDTH, dtype=torch.float64), dim=-1)
        layer.decay.fill_(40.0)
        layer.process.fill_(-60.0)
        layer.key_noise.fill_(-60.0)  # the decay there always is would show in the key's share of the variance
        layer.query_noise.fill_(0.2)
        layer.rotary.zero_()
        layer.to_out.weight.copy_(torch.eye(DIM, 2 * DIM))
        layer.to_v.weight[DIM:].zero_()
    # heads of unit length for queries and keys, put in by a map of the nine tokens that are there
    basis = torch.linalg.pinv(torch.cat([x[0], torch.ones(9, 1, dtype=torch.float64)], 1))
    fitted = basis @ token.flatten(1)
    with torch.no_grad():
        for linear in (layer.to_q, layer.to_k):
            linear.weight[:DIM] = fitted[:DIM].T
            linear.bias[:DIM] = fitted[DIM]
    spread = math.log(1 + math.exp(0.2)) + 2e-5
    scale = WIDTH**-0.5
    values = (x @ layer.to_v.weight[:DIM].T).view(9, HEADS, WIDTH)
    logits = torch.einsum("ihd,jhd->hij", token, token) * scale
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    dense = torch.einsum("hij,jhd->ihd", logits.masked_fill(hidden, -math.inf).softmax(-1), values).flatten(1)
    errors = []
    for nu in (2.0, 20.0, 200.0):
        with torch.no_grad():
            layer.tolerance.fill_(math.log(math.expm1(nu)))
            layer.temperature.fill_(math.sqrt(nu * WIDTH * spread * scale / 2))
            errors.append(float((layer(x)[0] - dense).abs().max()))
    assert errors[1] < 0.2 * errors[0]
    assert errors[2] < 0.3 * errors[1]
    assert errors[2] < 2e-3
    rotary, errors = 10_000.0 ** (-torch.arange(WIDTH // 2, dtype=torch.float64) / (WIDTH // 2)), []
    for share in (0.1, 0.01, 0.001):  # of dynamics and noise as they may be
        with torch.no_grad():
            layer.rotary.copy_((share * rotary).expand(HEADS, -1))
            layer.process.fill_(math.log(math.expm1(0.01 * share)))
            layer.decay.fill_(math.log((1 - share) / share))
            errors.append(float((layer(x)[0] - dense).abs().max()))
    assert errors[1] < 0.25 * errors[0] and errors[2] < 0.3 * errors[1], errors


def test_refusals_in_words() -> None:
    with pytest.raises(ValueError, match="conjugate pairs"):
        mixer("adaptive_filter_attention", 9, heads=3)
    with pytest.raises(ValueError, match="length"):
        mixer("adaptive_filter_attention", 8, heads=2, length=0)
