"""Sparsemax, entmax and Sinkhorn's weights against formulas and algorithms that the library does not use."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import (
    Packed,
    Weights,
    alibi,
    attend,
    attend_partial,
    blocks,
    causal,
    entmax,
    entmax15,
    explain,
    key_padding,
    sinkhorn,
    sparsemax,
    window,
)

B, H, G, D = 2, 4, 2, 5


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def inputs(n: int, m: int) -> list[Tensor]:
    return [leaf(B, H, n, D), leaf(B, G, m, D), leaf(B, G, m, D - 2)]


def repeated(x: Tensor) -> Tensor:
    return x.repeat_interleave(H // G, 1)


def weights_of(logits: Tensor, kind: Weights | str) -> Tensor:
    """What attend weighs keys by where its logits are these (N, M)."""
    n, m = logits.shape
    q, v = logits.new_zeros(1, 1, n, 1), torch.eye(m, dtype=logits.dtype).view(1, 1, m, m)
    return attend(q, q.new_zeros(1, 1, m, 1), v, bias=logits, weights=kind)[0, 0]


def sorted_sparsemax(row: list[float]) -> list[float]:
    """Martins and Astudillo, Algorithm 1."""
    ordered = sorted(row, reverse=True)
    support = max(j for j in range(1, len(row) + 1) if 1 + j * ordered[j - 1] > sum(ordered[:j]))
    tau = (sum(ordered[:support]) - 1) / support
    return [max(x - tau, 0.0) for x in row]


def sorted_entmax15(row: list[float]) -> list[float]:
    """Peters et al., Algorithm 2."""
    halves = [x / 2 for x in row]
    ordered = sorted(halves, reverse=True)
    for rho in range(1, len(row) + 1):
        mean = sum(ordered[:rho]) / rho
        spread = sum((x - mean) ** 2 for x in ordered[:rho])
        if spread > 1:
            break
        tau = mean - math.sqrt((1 - spread) / rho)
        if rho == len(row) or tau >= ordered[rho]:
            return [max(x - tau, 0.0) ** 2 for x in halves]
    raise AssertionError("one of the supports fits")


def bisected_entmax(row: list[float], alpha: float) -> list[float]:
    """The threshold by bisection, in Python's own numbers."""
    scores = [(alpha - 1) * x for x in row]
    low, high = max(scores) - 1, max(scores)
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(max(x - middle, 0.0) ** (1 / (alpha - 1)) for x in scores)
        low, high = (middle, high) if total > 1 else (low, middle)
    return [max(x - low, 0.0) ** (1 / (alpha - 1)) for x in scores]


@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_weights_are_those_of_the_papers_algorithms(spread: float) -> None:
    logits = spread * torch.randn(9, 13, dtype=torch.float64)
    logits[2, 3:] = logits[2, 3]  # ties
    cases: list[tuple[Any, Any]] = [
        ("sparsemax", sorted_sparsemax),
        ("entmax15", sorted_entmax15),
        (entmax(2), sorted_sparsemax),
        (entmax(1.5), sorted_entmax15),
        (entmax(1.05), lambda row: bisected_entmax(row, 1.05)),
        (entmax(1.3), lambda row: bisected_entmax(row, 1.3)),
        (entmax(torch.tensor([1.8])), lambda row: bisected_entmax(row, torch.tensor(1.8).item())),
    ]
    for kind, algorithm in cases:
        expected = torch.tensor([algorithm(row) for row in logits.tolist()], dtype=torch.float64)
        torch.testing.assert_close(weights_of(logits, kind), expected, atol=1e-10, rtol=1e-8)


def jacobian(weights: Tensor, alpha: float) -> Tensor:
    """Of a row: diag(s) - s s^T / sum(s) with s = weights ** (2 - alpha) on the support."""
    s = torch.where(weights > 0, weights ** (2 - alpha), 0)
    return torch.diag(s) - torch.outer(s, s) / s.sum()


@pytest.mark.parametrize(("kind", "alpha"), [("sparsemax", 2.0), ("entmax15", 1.5), (entmax(1.2), 1.2)], ids=str)
def test_the_gradient_is_the_papers_jacobian(kind: Any, alpha: float) -> None:
    row = torch.randn(1, 8, dtype=torch.float64)
    found = torch.autograd.functional.jacobian(lambda x: weights_of(x, kind)[0], row)[:, 0]
    torch.testing.assert_close(found, jacobian(weights_of(row, kind)[0], alpha), atol=1e-9, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("alpha", [1.5, 1.25])
def test_gradients_of_everything_alpha_included(alpha: float) -> None:
    q, k, v = (leaf(1, H, n, 3) for n in (3, 5, 5))
    slopes, alphas = torch.rand(H, dtype=torch.float64).requires_grad_(), torch.full((H,), alpha).double()
    alphas += 0.1 * torch.rand(H)
    alphas.requires_grad_()

    def run(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, alphas: Tensor) -> Tensor:
        return attend(q, k, v, window(3, 3), bias=alibi(slopes), weights=entmax(alphas), softcap=3.0)

    assert torch.autograd.gradcheck(run, (q, k, v, slopes, alphas))
    given = (q, k, v, slopes, alphas)
    tangents = tuple(torch.randn_like(x) for x in given)
    forward = torch.func.jvp(run, given, tangents)[1]
    cotangent = torch.randn_like(forward)
    backward = torch.autograd.grad((run(*given) * cotangent).sum(), given)
    total = sum((x * t).sum() for x, t in zip(backward, tangents, strict=True))
    torch.testing.assert_close((forward * cotangent).sum(), total)


def test_second_derivatives_of_one_and_a_half() -> None:
    q, k, v = inputs(2, 5)
    assert torch.autograd.gradgradcheck(lambda q, k: attend(q, k, v, weights="entmax15"), (q, k))


@pytest.mark.parametrize("kind", ["sparsemax", "entmax15", entmax(1.7)], ids=str)
def test_only_visible_keys_count_in_packs_beside_padding_and_with_fewer_queries(kind: Any) -> None:
    q, k, v = inputs(5, 9)
    out = attend(q, k, v, window(3) & causal, weights=kind)
    for i in range(5):
        keys = slice(max(i + 4 - 3, 0), i + 5)
        alone = attend(q[:, :, i : i + 1], k[:, :, keys], v[:, :, keys], weights=kind)
        torch.testing.assert_close(out[:, :, i : i + 1], alone)
    q, k, v = inputs(9, 9)
    packed = attend(q, k, v, weights=kind, layout=Packed([4, 5]))
    for text in (slice(0, 4), slice(4, 9)):
        torch.testing.assert_close(packed[:, :, text], attend(*(x[:, :, text] for x in (q, k, v)), weights=kind))
    mask = torch.ones(B, 9, dtype=torch.bool)
    mask[0], mask[1, 5:] = False, False
    padded = attend(q, k, v, key_padding(mask), weights=kind)
    torch.testing.assert_close(padded[1:, :, :5], attend(*(x[1:, :, :5] for x in (q, k, v)), weights=kind))
    assert torch.equal(padded[0], torch.zeros_like(padded[0]))  # rows that see no key
    for grad in torch.autograd.grad(padded.sum(), (q, k, v)):
        assert grad.isfinite().all() and torch.equal(grad[0], torch.zeros_like(grad[0]))


@pytest.mark.parametrize("kind", ["sparsemax", "entmax15"])
def test_what_is_not_finite_stays_in_rows_that_see_it(kind: str) -> None:
    q, k, v = (x.detach() for x in inputs(7, 7))
    clean = attend(q, k, v, causal, weights=kind)
    k[:, :, 4] = float("nan")
    spoiled = attend(q, k, v, causal, weights=kind)
    torch.testing.assert_close(spoiled[:, :, :4], clean[:, :, :4])
    assert spoiled[:, :, 4:].isnan().all()
    hidden = torch.zeros(7, 7, dtype=torch.float64)
    hidden[:, 5:] = float("-inf")
    q, k, v = (x.detach() for x in inputs(7, 7))
    expected = attend(q, k[:, :, :5], v[:, :, :5], weights=kind)
    torch.testing.assert_close(attend(q, k, v, bias=hidden, weights=kind), expected)


@pytest.mark.parametrize("kind", ["sparsemax", "entmax15", entmax(1.1), sinkhorn(4)], ids=str)
def test_low_precision_and_compiled(kind: Any) -> None:
    q, k, v = (x.detach() for x in inputs(12, 12))
    half = [x.bfloat16() for x in (q, k, v)]
    expected = attend(*(x.double() for x in half), weights=kind)
    torch.testing.assert_close(attend(*half, weights=kind).double(), expected, atol=0.05, rtol=0.05)
    single = attend(*(x.float() for x in half), weights=kind)
    torch.testing.assert_close(single.double(), expected, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: attend(q, k, v, blocks(5), weights=kind), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), attend(q, k, v, blocks(5), weights=kind))


def normalised_by_turns(logits: Tensor, times: int) -> Tensor:
    table = logits.exp()
    for step in range(times):
        table = table / table.sum(-1 if step % 2 == 0 else -2, keepdim=True)
    return table


@pytest.mark.parametrize("times", [1, 2, 5])
def test_sinkhorn_normalises_rows_and_columns_in_turn(times: int) -> None:
    q, k, v = inputs(7, 7)
    out = attend(q, k, v, weights=sinkhorn(times))
    expected = normalised_by_turns(q @ repeated(k).mT / math.sqrt(D), times) @ repeated(v)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    pairs = (torch.autograd.grad((x * cotangent).sum(), (q, k, v)) for x in (out, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)
    if times == 1:
        torch.testing.assert_close(out, attend(q, k, v, impl="reference"))


def test_sinkhorn_of_packs_and_padding_is_that_of_each_text_alone() -> None:
    q, k, v = inputs(9, 9)
    packed = attend(q, k, v, weights=sinkhorn(5), layout=Packed([4, 5]))
    for text in (slice(0, 4), slice(4, 9)):
        torch.testing.assert_close(packed[:, :, text], attend(*(x[:, :, text] for x in (q, k, v)), weights=sinkhorn(5)))
    mask = torch.ones(B, 9, dtype=torch.bool)
    mask[0, 6:], mask[1, :2] = False, False
    padded = attend(q, k, v, key_padding(mask), weights=sinkhorn(5))
    for entry, text in ((slice(0, 1), slice(0, 6)), (slice(1, 2), slice(2, 9))):
        alone = attend(*(x[entry, :, text] for x in (q, k, v)), weights=sinkhorn(5))
        torch.testing.assert_close(padded[entry, :, text], alone)
    assert torch.equal(padded[0, :, 6:], torch.zeros_like(padded[0, :, 6:]))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(padded.sum(), (q, k, v)))


def test_dropout_falls_on_these_weights_too() -> None:
    q, k, v = inputs(6, 6)
    kept = attend(q, k, v, weights="sparsemax", dropout=0.5, seed=3)
    eye = torch.eye(6, dtype=torch.float64).expand(B, G, 6, 6)
    weights = attend(q, k, eye, weights="sparsemax")
    dropped = attend(q, k, eye, weights="sparsemax", dropout=0.5, seed=3)
    assert ((dropped == 0) | ((dropped - 2 * weights).abs() < 1e-12)).all()
    torch.testing.assert_close(kept, dropped @ repeated(v))


def test_refusals_in_words() -> None:
    q, k, v = inputs(6, 6)
    for kind in (sparsemax(), entmax15(), entmax(1.2), sinkhorn()):
        found = explain(q, k, v, weights=kind)
        assert found.chosen == "reference"
        assert found.reasons["tiles"] == f"it has softmax, sigmoid and relu weights, not {kind.kind}"
        with pytest.raises(ValueError, match="do not merge"):
            attend_partial(q, k, v, weights=kind)
        with pytest.raises(NotImplementedError, match=kind.kind):
            attend(q, k, v, weights=kind, impl="tiles")
    for alpha in (1.0, 2.5, float("nan"), torch.tensor([1.5, 0.5])):
        with pytest.raises(ValueError, match="above 1"):
            entmax(alpha)
    with pytest.raises(ValueError, match="each of the 4 heads"):
        attend(q, k, v, weights=entmax(torch.tensor([1.5, 1.2, 1.1])))
    with pytest.raises(ValueError, match="at least 1"):
        sinkhorn(0)
    with pytest.raises(ValueError, match="as many queries as keys"):
        attend(q[:, :, 1:], k, v, weights=sinkhorn())
    with pytest.raises(ValueError, match="would not be causal"):
        attend(q, k, v, window(3) & causal, weights=sinkhorn())
    with pytest.raises(ValueError, match="weights are one of"):
        attend(q, k, v, weights="entmax")
