"""attend: every implementation agrees with the definition, and the definition with plain loops."""

from __future__ import annotations

import random

import pytest
import torch
from tests.support.attend_inputs import LENGTHS, by_loops, leaves, random_call
from torch import Tensor

from foveate import (
    Grid,
    Packed,
    Partial,
    alibi,
    attend,
    attend_partial,
    blocks,
    causal,
    documents,
    full,
    key_padding,
    merge,
    neighborhood,
    per_head,
    power_of_two,
    random_blocks,
    sigmoid,
    sinks,
    softmax,
    strided,
    window,
)
from foveate.attention.impl import rows
from foveate.kernels.cpu.loader import library, status

PATTERNS = [
    full,
    causal,
    window(5),
    window(70, 3) & causal,
    window(9) & causal | sinks(4),
    strided(7) & causal,
    documents([20, 0, 30, 61]) & causal,
    power_of_two(16) | window(20) & causal,
    random_blocks(16, 0.3, seed=3) & causal,
    ~window(40),
]


def grads_of(partial: Partial, call: dict, cotangent: Tensor) -> list[Tensor]:
    loss = (partial.out * cotangent).sum()
    if partial.lse is not None:  # the log row sums are differentiable as well
        loss = loss + (torch.where(partial.lse.isinf(), 0, partial.lse) * cotangent[..., 0]).sum()
    return list(torch.autograd.grad(loss, leaves(call), allow_unused=True, materialize_grads=True))


def assert_agrees(call: dict, pattern, **more) -> None:
    results = []
    cotangent = torch.randn(*call["q"].shape[:3], call["v"].shape[3], dtype=torch.float64)
    for impl in ("reference", "tiles"):
        partial = attend_partial(**call, pattern=pattern, **more, impl=impl)
        results.append([partial.out, partial.lse, *grads_of(partial, call, cotangent)])
    for expected, got in zip(*results, strict=True):
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_tiles_agree_with_the_definition_in_value_and_every_gradient(pattern, lengths) -> None:
    assert_agrees(random_call(*lengths), pattern)


def test_patterns_per_head_and_per_batch_entry() -> None:
    call = random_call(65, 65)
    heads = call["q"].shape[1]
    own = per_head([random.choice(PATTERNS[:6]) for _ in range(heads)])
    padded = torch.rand(2, 65) < 0.7
    assert_agrees(call, own & key_padding(padded) & causal)


def test_tiles_cut_into_segments_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BUDGET", 64 * 64 * 2)
    assert_agrees(random_call(200, 300), causal)
    assert_agrees(random_call(200, 200), window(150) & causal | sinks(3))


def test_grids_and_packed_layouts_agree() -> None:
    assert_agrees(random_call(77, 77) | {"bias": None}, neighborhood((3, 5)), layout=Grid(7, 11))
    assert_agrees(random_call(77, 77), causal, layout=Packed([30, 0, 47]))


def test_packed_sequences_are_separate_ones() -> None:
    q, k, v = torch.randn(3, 1, 2, 50, 8, dtype=torch.float64).unbind(0)
    packed = attend(q, k, v, causal, layout=Packed([20, 30]))
    parts = [attend(*(x[:, :, cut] for x in (q, k, v)), causal) for cut in (slice(0, 20), slice(20, 50))]
    torch.testing.assert_close(packed, torch.cat(parts, dim=2))


@pytest.mark.parametrize("pattern", PATTERNS[:7], ids=str)
@pytest.mark.parametrize("lengths", [(1, 9), (7, 9), (12, 9)], ids=str)
def test_the_definition_agrees_with_plain_loops(pattern, lengths) -> None:
    num_queries, num_keys = lengths
    q, k, v = (
        torch.randn(1, 4, num_queries, 3),
        torch.randn(1, 2, num_keys, 3),
        torch.randn(1, 1, num_keys, 5),
    )
    visible = torch.tensor(
        [[bool(pattern.allows(i + num_keys - num_queries, j)) for j in range(num_keys)] for i in range(num_queries)]
    )
    for impl in ("reference", "auto"):
        torch.testing.assert_close(attend(q, k, v, pattern, impl=impl), by_loops(q, k, v, visible))


@pytest.mark.parametrize("weights", ["softmax", "sigmoid", "relu"])
@pytest.mark.parametrize("impl", ["reference", "tiles"])
def test_any_split_of_the_keys_merges_to_the_whole(weights: str, impl: str) -> None:
    q, k, v = torch.randn(3, 2, 3, 90, 8, dtype=torch.float64).unbind(0)
    cuts = sorted(random.sample(range(91), 3))
    whole = attend_partial(q, k, v, weights=weights, impl=impl)
    spans = zip([0, *cuts], [*cuts, 90], strict=True)
    parts = [attend_partial(q, k[:, :, a:b], v[:, :, a:b], weights=weights, impl=impl) for a, b in spans]
    merged = merge(parts)
    torch.testing.assert_close(merged.out, whole.out)
    if weights == "softmax":
        torch.testing.assert_close(merged.lse, whole.lse)


@pytest.mark.parametrize("impl", ["auto", "sdpa", "tiles", "reference"])
def test_rows_that_see_no_key_are_zero_and_have_finite_gradients(impl: str) -> None:
    q, k, v = (torch.randn(2, 2, 70, 8, requires_grad=True) for _ in range(3))
    nothing = window(3) & ~window(3)
    some = causal & ~sinks(1) & ~window(0, 1)
    for pattern in (nothing, some):
        out = attend(q, k, v, pattern, impl=impl)
        assert (out[:, :, 0] == 0).all()
        for grad in torch.autograd.grad(out.square().sum(), (q, k, v)):
            assert grad.isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "tiles"])
def test_extreme_logits_stay_finite(impl: str) -> None:
    q, k, v = (torch.randn(1, 1, 70, 4, requires_grad=True) for _ in range(3))
    for factor in (1e4, -1e4, 0.0):
        out = attend(q, k, v, causal, scale=factor, impl=impl)
        assert out.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [causal, window(9) & causal | sinks(4), blocks(13)], ids=str)
def test_half_precision_is_within_twice_the_plain_error(dtype: torch.dtype, pattern) -> None:
    exact = [x.to(dtype).double().requires_grad_() for x in torch.randn(3, 2, 4, 111, 16)]
    cotangent = torch.randn(2, 4, 111, 16).to(dtype)

    def run(impl: str, to: torch.dtype) -> list[Tensor]:
        inputs = [x.detach().to(to).requires_grad_() for x in exact]
        out = attend(*inputs, pattern, impl=impl)
        return [out, *torch.autograd.grad(out, inputs, cotangent.to(to))]

    truth = run("reference", torch.float64)
    for right, plain, ours in zip(truth, run("reference", dtype), run("tiles", dtype), strict=True):
        rounding = torch.finfo(dtype).eps * right.abs().max()
        assert (ours.double() - right).abs().max() <= 2 * (plain.double() - right).abs().max() + rounding


def test_sdpa_agrees_where_it_runs() -> None:
    for heads in (4, 2, 1):
        q, k, v = torch.randn(2, 4, 60, 8), torch.randn(2, heads, 90, 8), torch.randn(2, heads, 90, 5)
        for bias in (None, torch.randn(60, 90), torch.randn(1, 4, 1, 90)):
            for pattern in (full, causal, window(7) & causal, per_head([window(3), causal])):
                expected = attend(q, k, v, pattern, bias=bias, impl="reference")
                torch.testing.assert_close(attend(q, k, v, pattern, bias=bias, impl="sdpa"), expected)


def test_lengths_of_zero() -> None:
    q, k, v = torch.randn(2, 3, 0, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 6)
    for impl in ("auto", "tiles", "reference"):
        assert attend(q, k, v, impl=impl).shape == (2, 3, 0, 6)
        assert (attend(k, q, torch.randn(2, 3, 0, 6), window(3), impl=impl) == torch.zeros(2, 3, 5, 6)).all()


def test_tiles_need_no_memory_for_all_pairs() -> None:
    length = 40_000  # all pairs of one head would be 6.4 GB
    q, k, v = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, window(64) & causal | sinks(2), impl="tiles")
    out.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


REFUSED = {
    "q must be a torch.Tensor": {"q": [1.0]},
    "batch, heads, length, dim": {"q": torch.randn(4, 8)},
    "share one of float64": {"k": torch.randn(1, 2, 9, 8).half()},
    "one batch size": {"k": torch.randn(2, 2, 9, 8), "v": torch.randn(1, 2, 9, 8)},
    "one length": {"v": torch.randn(1, 2, 7, 8)},
    "one head dim": {"k": torch.randn(1, 2, 9, 4)},
    "heads must divide": {"k": torch.randn(1, 3, 9, 8)},
    "must be a Foveate pattern": {"pattern": torch.ones(9, 9).bool()},
    "does not divide": {"pattern": per_head([causal] * 2 + [full])},
    "for a batch of 3": {"pattern": key_padding(torch.ones(3, 9).bool())},
    "bias must broadcast": {"bias": torch.randn(8, 9)},
    "weights are one of": {"weights": "cosine"},
    "sink must be a number": {"weights": softmax(sink=torch.randn(3))},
    "logit bias must have one": {"weights": sigmoid(bias=torch.randn(3))},
    "softcap must be a positive": {"softcap": -1.0},
    "dropout is a probability": {"dropout": 1.5},
    "impl is 'auto' or one of": {"impl": "fastest"},
    "has 12 tokens": {"layout": Grid(3, 4)},
    "cannot run this call: it has softmax weights only": {"impl": "sdpa", "weights": "relu"},
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_is_refused_in_words(words: str) -> None:
    call = dict(zip("qkv", torch.randn(3, 1, 4, 9, 8).unbind(0), strict=True)) | REFUSED[words]
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=words.replace("(", r"\(")):
        attend(**call)


def test_merge_refuses_what_cannot_be_joined() -> None:
    q, k, v = torch.randn(3, 1, 1, 3, 4).unbind(0)
    with pytest.raises(ValueError, match="at least one"):
        merge([])
    with pytest.raises(ValueError, match="cannot join"):
        merge([attend_partial(q, k, v), attend_partial(q, k, v, weights="relu")])


@pytest.mark.parametrize("impl", ["tiles", "native"])
def test_a_steep_bias_raises_no_infinity_from_the_slots_without_a_query(impl: str) -> None:
    q, k, v = (torch.randn(1, 1, n, 3, requires_grad=True) for n in (3, 300, 300))
    slopes = torch.tensor([-2.0])  # 600 at the farthest key: its exponential is beyond float32
    grads = []
    for name in ("reference", impl):
        if name == "native" and library() is None:
            pytest.skip(f"no native kernels: {status().reason}")
        out = attend(q, k, v, causal, bias=alibi(slopes), impl=name)
        grads.append(torch.autograd.grad(out.sum(), (q, k, v)))
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
