"""Sparsifiner: the predictor and its mask, written out; what it learns from; operations and time."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.formulas import follows
from tests.support.on_grids import heads_of, joined, masked, measured
from torch import Tensor, nn

from foveate.catalogue.registry import mixer
from foveate.counting import count_operations

DIM, HEADS, TOKENS = 12, 3, 21


def made(**options: float) -> nn.Module:
    found = mixer("sparsifiner", DIM, heads=HEADS, tokens=TOKENS, reduce_tokens=4, **options).double()
    with torch.no_grad():
        for name in ("mixed", "basis"):  # larger than they begin, or the coefficients would all be alike
            getattr(found, name).normal_()
    return found


def projected(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (heads_of(x, each.weight, each.bias, HEADS) for each in (layer.to_q, layer.to_k, layer.to_v))
    return q, k, v


def coefficients(layer: nn.Module, q: Tensor, k: Tensor) -> Tensor:
    low_q = q @ layer.reduce_q.weight.T + layer.reduce_q.bias
    low_k = k @ layer.reduce_k.weight.T + layer.reduce_k.bias
    keys = torch.einsum("bhnd,nr->bhrd", low_k, layer.mixed)
    return torch.softmax(torch.einsum("bhnd,bhrd->bhnr", low_q, keys) / HEADS**0.5, -1)


def mask(layer: nn.Module, q: Tensor, k: Tensor, budget: int, above: float, basis_above: float, first: int) -> Tensor:
    found = coefficients(layer, q, k).detach()
    basis = layer.basis.detach().abs()
    scores = torch.where(found > above, found, 0) @ torch.where(basis > basis_above, basis, 0).T
    seen = torch.zeros(scores.shape, dtype=torch.bool)
    for row, of_row in zip(scores.flatten(0, 2), seen.view(-1, TOKENS), strict=True):
        of_row[sorted(range(TOKENS), key=lambda j: -float(row[j]))[:budget]] = True
    seen[:, :, :first] = True
    return seen


@pytest.mark.paper("Sparsifiner", "definition")
@pytest.mark.paper("Sparsifiner", "works_when")
@pytest.mark.parametrize(
    ("keep", "above", "basis_above", "class_token"), [(0.25, 0.0, 0.0, True), (0.4, 0.1, 0.3, False)]
)
def test_it_is_masked_attention_written_out(keep: float, above: float, basis_above: float, class_token: bool) -> None:
    options = {"keep": keep, "coefficient_threshold": above, "basis_threshold": basis_above, "class_token": class_token}
    layer = made(**options)
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64, requires_grad=True)

    def formula() -> Tensor:
        q, k, v = projected(layer, x)
        seen = mask(layer, q, k, math.ceil(keep * TOKENS), above, basis_above, int(class_token))
        return joined(masked(q, k, v, seen)) @ layer.to_out.weight.T + layer.to_out.bias

    follows(layer, lambda: layer(x), formula, x)


@pytest.mark.paper("Sparsifiner", "definition")
def test_the_predictor_learns_from_the_layer_s_full_attention() -> None:
    layer = made()
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64, requires_grad=True)

    def formula() -> Tensor:
        q, k, _ = projected(layer, x)
        exact = torch.softmax(q @ k.mT / 2, -1).detach()
        return ((coefficients(layer, q, k) @ layer.basis.T - exact)[:, :, 1:] ** 2).mean()

    follows(layer, lambda: layer.distillation_loss(x), formula, x)


@pytest.mark.paper("Sparsifiner", "works_when")
def test_trained_it_keeps_more_of_the_attention_than_when_it_began() -> None:
    """The predictor alone learns; what its masks keep of full attention's weights rises, on images not seen."""
    layer = mixer("sparsifiner", 16, heads=2, tokens=24, reduce_tokens=2, keep=0.25, class_token=False)
    with torch.no_grad():
        for each in (layer.to_q, layer.to_k):
            each.weight.mul_(4)
    places = torch.randn(24, 16)
    learns = [*layer.reduce_q.parameters(), *layer.reduce_k.parameters(), layer.mixed, layer.basis]
    optimiser = torch.optim.Adam(learns, lr=2e-2)

    @torch.no_grad()
    def kept() -> float:
        q, k, _ = layer.project(fresh := places + 0.3 * torch.randn(16, 24, 16), fresh)
        weights = torch.softmax(q @ k.mT / 8**0.5, -1)
        return float((weights * layer.mask(q, k)).sum(-1).mean())

    before = kept()
    for _ in range(150):
        loss = layer.distillation_loss(places + 0.3 * torch.randn(8, 24, 16))
        optimiser.zero_grad()
        loss.backward()
        assert all(bool(parameter.grad.abs().sum() > 0) for parameter in learns)
        optimiser.step()
    assert kept() > before + 0.15


@pytest.mark.paper("Sparsifiner", "works_when")
def test_a_quarter_of_the_pairs_remains_and_the_time_is_on_record() -> None:
    """And of attention's operations two thirds, with the predictor's, at heads of 64 channels."""
    layer = mixer("sparsifiner", 128, heads=2, tokens=197)
    with torch.no_grad(), count_operations() as counted:
        layer(torch.randn(1, 197, 128))
    assert counted.pairs == 2 * (197 + 196 * 50)
    predictor = 2 * (2 * 2 * 197 * 64 * 32 + 2 * 2 * 32 * 197 * 24 + 2 * 197 * 24 * 197)
    sparse = predictor + 256 * counted.pairs
    assert counted.flops == sparse + 4 * 2 * 197 * 128**2
    assert sparse / (2 * 256 * 197**2) == pytest.approx(0.668, abs=0.01)
    lines = measured("sparsifiner")
    assert {line["task"] for line in lines} == {"forward", "forward + backward"}
    assert all(line["tokens"] == 196 and 0.24 < line["share_of_pairs"] < 0.26 for line in lines)
    assert all(line["seconds"]["dense"] < line["seconds"]["sparse"] for line in lines)  # as the docstring says


def test_other_numbers_of_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="built for 21 tokens; got 20"):
        made()(torch.randn(1, 20, DIM, dtype=torch.float64))
    with pytest.raises(ValueError, match="some of the keys are kept"):
        made(keep=0.0)
