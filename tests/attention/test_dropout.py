"""Dropout on weights: the pairs that the documented function names, in every implementation, with exact gradients."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tests.support.attend_inputs import LENGTHS, leaves, random_call
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from foveate import attend, causal, explain, full, per_head, sinks, window

IMPLEMENTATIONS = ("reference", "tiles")


def mixed(x: int) -> int:
    x %= 2**32
    x = (x ^ x // 2**16) * 0x21F0AAAD % 2**32
    x = (x ^ x // 2**15) * 0x735A2D97 % 2**32
    return x ^ x // 2**15


def kept(p: float, seed: int, shape: tuple[int, ...]) -> Tensor:
    """The definition, pair by pair with Python's integers."""
    keep = torch.empty(shape, dtype=torch.bool)
    first = mixed(mixed(seed % 2**32) ^ (seed // 2**32) % 2**32)
    for b in range(shape[0]):
        of_batch = mixed(first ^ mixed(b + 0x1E3779B9))
        for h in range(shape[1]):
            of_head = mixed(of_batch ^ mixed(h + 0x1E3779B9))
            for i in range(shape[2]):
                row = mixed(of_head ^ mixed(i + 0x1E3779B9))
                for j in range(shape[3]):
                    keep[b, h, i, j] = mixed(row ^ mixed(j + 0x1E3779B9)) >= round(p * 2**32)
    return keep


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_weights_named_by_the_seed_are_dropped_and_the_others_grow(impl: str) -> None:
    q, k, v = (torch.randn(2, h, n, 5, dtype=torch.float64, requires_grad=True) for h, n in ((4, 9), (2, 13), (1, 13)))
    p, seed, pattern = 0.3, random.randrange(-(2**63), 2**63), window(6) & causal | sinks(1)
    logits = q @ k.repeat_interleave(2, 1).mT * 5**-0.5
    at, key = torch.arange(9).view(-1, 1) + 4, torch.arange(13)
    visible = (key <= at) & (at - key <= 6) | (key < 1)
    weights = torch.softmax(logits.masked_fill(~visible, -torch.inf), -1)
    expected = weights * kept(p, seed, (2, 4, 9, 13)) / (1 - p) @ v
    found = attend(q, k, v, pattern, dropout=p, seed=seed, impl=impl)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    pairs = (torch.autograd.grad((out * direction).sum(), (q, k, v)) for out in (found, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_tiles_drop_what_the_definition_drops(lengths: tuple[int, int]) -> None:
    for _ in range(4):
        call: dict[str, Any] = random_call(*lengths)
        heads = [window(9), full] if call["q"].shape[1] % 2 == 0 else [window(9)]
        options = dict(
            pattern=per_head(heads) & causal, dropout=random.choice([0.1, 0.7]), seed=random.randrange(2**40)
        )
        found = [attend(**call, **options, impl=impl) for impl in IMPLEMENTATIONS]
        torch.testing.assert_close(*found)
        direction = torch.randn_like(found[0])
        pairs = [torch.autograd.grad((out * direction).sum(), leaves(call)) for out in found]
        for one, other in zip(*pairs, strict=True):
            torch.testing.assert_close(one, other)


def test_the_share_kept_is_what_was_asked_in_every_row_and_column() -> None:
    size, p = 400, 0.25
    q, k = torch.zeros(2, 1, 2, size, 1).unbind(0)
    dropped = attend(q, k, torch.eye(size).view(1, 1, size, size), dropout=p, seed=7) == 0  # (1, 2, N, M)
    spread = (p * (1 - p)) ** 0.5
    for dims in ((2, 3), (1, 3), (1, 2)):
        share = dropped.float().mean(dims)
        assert ((share - p).abs() < 6 * spread * (share.numel() / dropped.numel()) ** 0.5).all()
    assert (dropped[0, 0] != dropped[0, 1]).float().mean() > p


def test_torchs_seed_repeats_a_call_and_the_next_call_differs() -> None:
    q = k = v = torch.randn(1, 2, 30, 4)
    torch.manual_seed(3)
    one, other = (attend(q, k, v, causal, dropout=0.5) for _ in range(2))
    torch.manual_seed(3)
    again = attend(q, k, v, causal, dropout=0.5)
    assert torch.equal(one, again) and not torch.equal(one, other)
    state = torch.get_rng_state()
    attend(q, k, v, causal)
    attend(q, k, v, causal, dropout=0.5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_drops_the_same_weights(reentrant: bool) -> None:
    q, k, v = (torch.randn(1, 2, 40, 4, requires_grad=True) for _ in range(3))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, window(9) & causal, dropout=0.4)

    gradients = []
    for call in (run, lambda *x: checkpoint(run, *x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        out = call(q, k, v)
        q.grad = k.grad = v.grad = None
        out.square().sum().backward()
        gradients.append([x.grad.clone() for x in (q, k, v)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph_drops_the_same_and_draws_anew(dynamic: bool) -> None:
    q, k, v = (torch.randn(1, 2, 70, 4, requires_grad=True) for _ in range(3))
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def run(q: Tensor, k: Tensor, v: Tensor, seed: int | None) -> Tensor:
        return attend(q, k, v, window(9) & causal, dropout=0.4, seed=seed)

    found, expected = run(q, k, v, 11), attend(q, k, v, window(9) & causal, dropout=0.4, seed=11)
    torch.testing.assert_close(found, expected)
    pairs = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (found, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(run(q, k, v, None), run(q, k, v, None))


def test_what_is_no_probability_or_no_seed_is_refused() -> None:
    q = k = v = torch.randn(1, 1, 4, 4)
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="probability"):
            attend(q, k, v, dropout=p)
    for seed in (1.5, torch.tensor(1.5), torch.tensor([1, 2]), 2**63):
        with pytest.raises(TypeError, match="seed is an integer"):
            attend(q, k, v, dropout=0.1, seed=seed)  # type: ignore[arg-type]
    for impl in ("native", "sdpa"):
        with pytest.raises(NotImplementedError, match="drop"):
            attend(q, k, v, dropout=0.1, impl=impl)
    assert "dropout" in str(explain(q, k, v, dropout=0.1).reasons["native"])
    assert torch.equal(attend(q, k, v, dropout=0.3, seed=torch.tensor(5)), attend(q, k, v, dropout=0.3, seed=5))
