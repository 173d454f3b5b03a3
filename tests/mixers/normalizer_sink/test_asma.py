"""ASMA: entmax with a learned alpha in each head, and alignments that only move forward."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.formulas import follows
from torch import Tensor

from foveate.catalogue.registry import mixer
from foveate.mixers.normalizer_sink.adaptive_sparse import monotonic_alignment

DIM, HEADS, WIDTH = 12, 3, 4


def entmax_row(logits: Tensor, alpha: Tensor) -> Tensor:
    """[(α - 1) z - τ]_+ ^ (1 / (α - 1)): τ by bisection, then one step of Newton's method for its derivatives."""
    scores = (alpha - 1) * logits
    low, high = scores.detach().max() - 1, scores.detach().max()
    for _ in range(200):
        middle = (low + high) / 2
        total = ((scores.detach() - middle).clamp_min(0) ** (1 / (alpha.detach() - 1))).sum()
        low, high = (middle, high) if total > 1 else (low, middle)
    power = 1 / (alpha - 1)
    support = scores > low
    above = (scores - low)[support]
    tau = low + ((above**power).sum() - 1) / (power * above ** (power - 1)).sum().detach()
    weights = torch.zeros_like(scores)
    weights[support] = (scores[support] - tau) ** power
    return weights


def self_attention(layer: torch.nn.Module, x: Tensor, *, is_causal: bool) -> Tensor:
    batch, length, _ = x.shape
    q, k, v = ((x @ w.weight.T).view(batch, length, HEADS, WIDTH) for w in (layer.to_q, layer.to_k, layer.to_v))
    rows = []
    for b in range(batch):
        for i in range(length):
            seen = i + 1 if is_causal else length
            for h in range(HEADS):
                alpha = 1 + 1 / (1 + torch.exp(-layer.sparsity[h]))
                weights = entmax_row(k[b, :seen, h] @ q[b, i, h] / math.sqrt(WIDTH), alpha)
                rows.append(weights @ v[b, :seen, h])
    return torch.stack(rows).view(batch, length, DIM) @ layer.to_out.weight.T


def large(layer: torch.nn.Module) -> torch.nn.Module:
    """Logits large enough for weights of exactly 0."""
    with torch.no_grad():
        layer.to_q.weight.mul_(3)
        layer.to_k.weight.mul_(3)
    return layer


@pytest.mark.paper("ASMA", "definition")
@pytest.mark.paper("ASMA", "works_when")
@pytest.mark.parametrize("is_causal", [True, False])
def test_self_attention_is_its_formula_with_gradients_of_alpha(is_causal: bool) -> None:
    layer = large(mixer("adaptive_sparse_attention", DIM, heads=HEADS, causal=is_causal).double())
    x = torch.randn(2, 9, DIM, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(self_attention(layer, x, is_causal=is_causal).square().sum(), layer.sparsity)
    assert gradient.abs().min() > 1e-6  # what is compared is not 0
    follows(layer, lambda: layer(x), lambda: self_attention(layer, x, is_causal=is_causal), x, rtol=1e-6, atol=1e-6)


@pytest.mark.paper("ASMA", "works_when")
def test_the_gradient_of_alpha_is_the_slope_of_the_outputs() -> None:
    layer = large(mixer("adaptive_sparse_attention", DIM, heads=HEADS).double())
    x, towards = torch.randn(2, 1, 9, DIM, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((layer(x) * towards).sum(), layer.sparsity)
    for h in range(HEADS):
        values = []
        for move in (1e-5, -2e-5):
            with torch.no_grad():
                layer.sparsity[h] += move
            values.append(float((self_attention(layer, x, is_causal=True) * towards).sum().detach()))
        with torch.no_grad():
            layer.sparsity[h] += 1e-5
        assert abs((values[0] - values[1]) / 2e-5 - float(gradient[h])) < 1e-5 * (1 + abs(float(gradient[h])))


@pytest.mark.paper("ASMA", "works_when")
def test_alpha_lies_between_softmax_and_sparsemax_and_reaches_both() -> None:
    layer = large(mixer("adaptive_sparse_attention", DIM, heads=1, causal=False).double())
    torch.nn.init.eye_(layer.to_v.weight)
    torch.nn.init.eye_(layer.to_out.weight)
    x = torch.randn(1, 9, DIM, dtype=torch.float64)
    q, k = x @ layer.to_q.weight.T, x @ layer.to_k.weight.T
    logits = (q @ k.mT / math.sqrt(DIM))[0]
    ranks = torch.arange(1, 10, dtype=torch.float64)
    for slope, expected in ((-18.0, logits.softmax(-1)), (30.0, None)):
        with torch.no_grad():
            layer.sparsity.fill_(slope)
        if expected is None:  # sparsemax by sorting (Martins and Astudillo 2016, algorithm 1)
            order = logits.sort(-1, descending=True).values
            sums = order.cumsum(-1)
            size = (1 + ranks * order > sums).sum(-1, keepdim=True)
            expected = (logits - (sums.gather(-1, size - 1) - 1) / size).clamp_min(0)
            assert (expected == 0).any()
        torch.testing.assert_close(layer(x)[0], expected @ x[0], rtol=1e-5, atol=1e-5)


@pytest.mark.paper("ASMA", "works_when")
def test_more_keys_have_no_weight_at_all_in_heads_of_greater_alpha() -> None:
    """A weight is what the output changes by with its value."""
    layer = mixer("adaptive_sparse_attention", DIM, heads=HEADS, causal=False).double()
    with torch.no_grad():
        layer.sparsity.copy_(torch.tensor([-3.0, 0.0, 3.0]))
    q = torch.ones(1, HEADS, 1, WIDTH, dtype=torch.float64)
    logits = torch.linspace(-3, 3, 25, dtype=torch.float64)
    k = (logits / WIDTH * math.sqrt(WIDTH)).view(1, 1, 25, 1).expand(1, HEADS, 25, WIDTH)
    v = torch.randn(1, HEADS, 25, WIDTH, dtype=torch.float64, requires_grad=True)
    out = layer.attend(q, k, v, layer.within(None), None)
    zeros = []
    for h in range(HEADS):
        (gradient,) = torch.autograd.grad(out[0, h, 0, 0], v, retain_graph=True)
        weights = gradient[0, h, :, 0]
        torch.testing.assert_close(weights, entmax_row(logits, 1 + torch.sigmoid(layer.sparsity[h])).detach())
        zeros.append(int((weights == 0).sum()))
    assert 0 == zeros[0] < zeros[1] < zeros[2] < 25, zeros


def alignments(energy: Tensor) -> Tensor:
    """Every way to walk, weighed by its chance: over all keys at which query i - 1 may have stopped."""
    queries, keys = energy.shape
    chance = torch.sigmoid(energy)
    rows, before = [], [energy.new_ones(())] + [energy.new_zeros(())] * (keys - 1)
    for i in range(queries):
        here = [energy.new_zeros(())] * keys
        for start in range(keys):
            going = before[start]
            for j in range(start, keys):
                here[j] = here[j] + going * chance[i, j]
                going = going * (1 - chance[i, j])
        rows.append(torch.stack(here))
        before = here
    return torch.stack(rows)


def cross_attention(layer: torch.nn.Module, x: Tensor, context: Tensor) -> Tensor:
    outs = []
    for b in range(len(x)):
        heads = []
        for h in range(HEADS):
            part = slice(h * WIDTH, (h + 1) * WIDTH)
            q, k, v = (
                y[b] @ w.weight[part].T for y, w in ((x, layer.to_q), (context, layer.to_k), (context, layer.to_v))
            )
            heads.append(alignments(q @ k.T / math.sqrt(WIDTH) + layer.offset[h]) @ v)
        outs.append(torch.cat(heads, -1) @ layer.to_out.weight.T)
    return torch.stack(outs)


@pytest.mark.paper("ASMA", "definition")
@pytest.mark.paper("ASMA", "works_when")
def test_cross_attention_is_the_expectation_over_walks() -> None:
    layer = mixer("monotonic_attention", DIM, heads=HEADS).double().eval()
    assert layer.offset.tolist() == [-4.0] * HEADS
    with torch.no_grad():
        layer.offset.fill_(-0.5)
    x, context = (torch.randn(2, n, DIM, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    follows(layer, lambda: layer(x, context=context), lambda: cross_attention(layer, x, context), x, context)


@pytest.mark.paper("ASMA", "works_when")
def test_alignments_never_decrease() -> None:
    energy = 3 * torch.randn(2, 3, 17, 23, dtype=torch.float64)
    expected = monotonic_alignment(energy)
    assert expected.sum(-1).max() <= 1 + 1e-12
    behind = expected.cumsum(-1)  # the chance to have stopped at j or before
    assert (behind[:, :, 1:] <= behind[:, :, :-1] + 1e-12).all()
    hard = monotonic_alignment(torch.where(energy > 0, math.inf, -math.inf))
    assert ((hard == 0) | (hard == 1)).all()
    for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        at = 0
        for i in range(17):
            while at < 23 and energy[b, h, i, at] <= 0:
                at += 1
            wanted = torch.zeros(23, dtype=torch.float64)
            wanted[at : at + 1] = 1
            assert torch.equal(hard[b, h, i], wanted)  # at == 23: past the last key, nothing any more


@pytest.mark.paper("ASMA", "works_when")
def test_hard_attention_stops_where_chances_are_above_one_half() -> None:
    layer = mixer("monotonic_attention", DIM, heads=HEADS, hard=True).double().eval()
    with torch.no_grad():
        layer.offset.fill_(-0.3)
        layer.to_q.weight.mul_(4)
    x, context = (torch.randn(1, n, DIM, dtype=torch.float64) for n in (8, 13))
    alignment = layer.alignment(x, context)
    stops = [[row.argmax().item() if row.any() else 13 for row in head] for head in alignment[0]]
    assert all(stop == sorted(stop) for stop in stops)
    assert len({tuple(stop) for stop in stops}) > 1
    values = (context @ layer.to_v.weight.T).view(1, 13, HEADS, WIDTH)
    picked = [
        [values[0, j, h] if j < 13 else values.new_zeros(WIDTH) for h, j in enumerate(js)]
        for js in zip(*stops, strict=True)
    ]
    expected = torch.stack([torch.cat(row) for row in picked]) @ layer.to_out.weight.T
    torch.testing.assert_close(layer(x, context=context)[0], expected)


def test_while_training_noise_moves_the_energies() -> None:
    layer = mixer("monotonic_attention", DIM, heads=HEADS)
    x, context = torch.randn(1, 4, DIM), torch.randn(1, 6, DIM)
    assert not torch.equal(layer.train()(x, context=context), layer(x, context=context))
    quiet = mixer("monotonic_attention", DIM, heads=HEADS, noise=0.0)
    assert torch.equal(quiet.train()(x, context=context), quiet(x, context=context))
