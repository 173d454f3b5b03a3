"""Functions of scores, and a temperature for each query: dense formulas, gradients, padding, packs, parts, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from foveate import (
    Packed,
    alibi,
    attend,
    attend_partial,
    causal,
    explain,
    full,
    key_padding,
    log_decay,
    merge,
    relative_table,
    score_function,
    sigmoid,
    window,
)
from foveate.attention.call import prepare
from foveate.attention.impl.flex import attend_flex, plan, score_mod
from foveate.mixers.core import PatternCore
from foveate.mixers.exact_io.chunked import ChunkedCore
from foveate.mixers.static_sparse.delta_attention import DeltaCore
from foveate.patterns.select.flex import to_block_mask

B, H, G, D = 2, 4, 2, 5


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def inputs(n: int, m: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [leaf(B, H, n, D, dtype=dtype), leaf(B, G, m, D, dtype=dtype), leaf(B, G, m, D - 2, dtype=dtype)]


def repeated(x: Tensor) -> Tensor:
    return x.repeat_interleave(H // G, 1)


def bent(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, gain: Tensor, table: Tensor) -> Tensor:
    return gain[b, h] * torch.tanh(score) + table[h, (q - k).clamp(-3, 3) + 3]


def bent_by_loops(scores: Tensor, gain: Tensor, table: Tensor) -> Tensor:
    """What :func:`bent` says, one pair at a time."""
    rows = []
    for b in range(B):
        for h in range(H):
            for q in range(scores.shape[2]):
                for k in range(scores.shape[3]):
                    entry = table[h, max(-3, min(3, q - k)) + 3]
                    rows.append(gain[b, h] * torch.tanh(scores[b, h, q, k]) + entry)
    return torch.stack(rows).view_as(scores)


def assert_same(got: Tensor, expected: Tensor, leaves: list[Tensor], tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    cotangent = torch.randn_like(expected)
    pairs = (torch.autograd.grad((x * cotangent).sum(), leaves, retain_graph=True) for x in (got, expected))
    for one, other in zip(*pairs, strict=True):
        assert other.abs().sum() > 0
        torch.testing.assert_close(one, other, atol=tolerance * 10, rtol=tolerance * 10)


def masked_softmax(scores: Tensor, seen: Tensor) -> Tensor:
    return torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)


@pytest.mark.parametrize(("n", "m"), [(7, 7), (3, 9)])
def test_a_score_function_is_asked_of_every_pair_after_soft_cap_and_biases(n: int, m: int) -> None:
    q, k, v = inputs(n, m)
    gain, table, slopes = leaf(B, H), leaf(H, 7), leaf(H)
    bias = [score_function(bent, gain, table), alibi(slopes)]
    got = attend(q, k, v, window(4) & causal, bias=bias, softcap=2.0)
    distance = torch.arange(m)[-n:, None] - torch.arange(m)
    scores = 2 * torch.tanh(q @ repeated(k).mT / math.sqrt(D) / 2) - slopes.view(H, 1, 1) * distance.abs()
    weights = masked_softmax(bent_by_loops(scores, gain, table), (distance >= 0) & (distance <= 4))
    assert_same(got, weights @ repeated(v), [q, k, v, gain, table, slopes])


def test_functions_apply_one_after_the_other_before_weights_of_any_kind() -> None:
    q, k, v = inputs(5, 5)
    shift = leaf()
    doubled = score_function(lambda score, b, h, q, k: 2 * score)
    shifted = score_function(lambda score, b, h, q, k, shift: score + shift, shift)
    scores = q @ repeated(k).mT / math.sqrt(D)
    got = attend(q, k, v, bias=(doubled, shifted), weights=sigmoid(bias=0.25))
    assert_same(got, torch.sigmoid(2 * (scores + 0.25) + shift) @ repeated(v), [q, k, v, shift])
    other = attend(q, k, v, bias=(shifted, doubled), weights="relu")
    torch.testing.assert_close(other, torch.relu(2 * (scores + shift)) @ repeated(v))


def test_positions_are_slots_in_packs_and_beside_padding() -> None:
    q, k, v = inputs(9, 9)
    by_slot = leaf(9)
    function = score_function(lambda score, b, h, q, k, by_slot: score * by_slot[k] + q, by_slot)
    at = torch.arange(9)
    scores = q @ repeated(k).mT / math.sqrt(D) * by_slot + at[:, None]
    text = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2, 2])
    seen = (text[:, None] == text) & (at[:, None] >= at)
    got = attend(q, k, v, causal, bias=function, layout=Packed([4, 1, 4]))
    assert_same(got, masked_softmax(scores, seen) @ repeated(v), [q, k, v, by_slot])
    mask = torch.ones(B, 9, dtype=torch.bool)
    mask[1, :3] = False
    got = attend(q, k, v, key_padding(mask), bias=function)
    assert_same(got, masked_softmax(scores, mask[:, None, None]) @ repeated(v), [q, k, v, by_slot])


def test_parts_of_a_call_merge_and_cores_that_work_in_parts_ask_about_the_whole() -> None:
    q, k, v = inputs(11, 11)
    gain, table = leaf(B, H), leaf(H, 7)
    function = score_function(bent, gain, table)
    whole = attend(q, k, v, causal, bias=function)
    parts = [attend_partial(q, k, v, part, bias=function) for part in (window(3) & causal, causal & ~window(3))]
    torch.testing.assert_close(merge(parts).out, whole)
    for core in (ChunkedCore(4, 3), DeltaCore(PatternCore(full), stride=3)):
        assert_same(core(q, k, v, within=causal, bias=function), whole, [q, k, v, gain, table])


def test_compiled_to_one_graph_and_under_torch_func() -> None:
    q, k, v = inputs(6, 6)
    gain, table = leaf(B, H), leaf(H, 7)

    def run(q: Tensor, gain: Tensor) -> Tensor:
        return attend(q, k, v, window(3) & causal, bias=score_function(bent, gain, table))

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(compiled(q, gain), run(q, gain), [q, k, v, gain, table])
    found = torch.func.grad(lambda gain: run(q, gain).square().sum())(gain)
    torch.testing.assert_close(found, torch.autograd.grad(run(q, gain).square().sum(), gain)[0])
    assert torch.autograd.gradgradcheck(run, (q, gain))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_given_the_function_as_its_score_mod() -> None:
    q, k, v = (x.detach().float() for x in inputs(8, 8))
    gain, table = torch.randn(B, H), torch.randn(H, 7)
    bias = [alibi(torch.rand(H)), score_function(bent, gain, table)]
    call, _ = prepare(q, k, v, causal, bias, "softmax", None, 3.0, None, needs_lse=False)
    got = attend_flex(plan(call), flex_attention).out
    torch.testing.assert_close(got, attend(q, k, v, causal, bias=bias, softcap=3.0), atol=1e-5, rtol=1e-5)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_flex_attention_compiles_the_function() -> None:
    q, k, v = (torch.randn(B, H, 128, 16) for _ in range(3))
    bias = [alibi(torch.rand(H)), score_function(bent, torch.randn(B, H), torch.randn(H, 7))]
    call, _ = prepare(q, k, v, causal, bias, "softmax", None, 3.0, None, needs_lse=False)
    run, mask = torch.compile(flex_attention), to_block_mask(causal, 128, 128)
    got = run(q, k, v, score_mod=score_mod(call), block_mask=mask, scale=call.scale)
    torch.testing.assert_close(got, attend(q, k, v, causal, bias=bias, softcap=3.0), atol=1e-5, rtol=1e-5)


def test_who_cannot_says_so_and_wrong_functions_are_told() -> None:
    q, k, v = inputs(6, 6)
    same = score_function(lambda score, b, h, q, k: score)
    found = explain(q, k, v, bias=same)
    assert found.chosen == "reference"
    assert {found.reasons[name] for name in ("sdpa", "tiles")} == {"it has no score functions"}
    with pytest.raises(NotImplementedError, match="no score functions"):
        attend(q, k, v, bias=same, impl="tiles")
    with pytest.raises(TypeError, match="takes a function"):
        score_function(torch.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="arguments are tensors; got float"):
        score_function(bent, 0.5)  # type: ignore[arg-type]
    wrong: list[tuple[Any, type[Exception], str]] = [
        (lambda score, b, h, q, k: None, TypeError, "got NoneType"),
        (lambda score, b, h, q, k: q >= k, TypeError, "got torch.bool"),
        (lambda score, b, h, q, k: score[..., :3], ValueError, "elementwise"),
    ]
    for fn, error, words in wrong:
        with pytest.raises(error, match=words):
            attend(q, k, v, bias=score_function(fn))


@pytest.mark.parametrize("shape", [(), (1,), (1, H, 1), (B, 1, 7), (B, H, 7), (1, 1, 7)], ids=str)
@pytest.mark.parametrize(("impl", "dtype"), [("reference", 64), ("tiles", 64), ("sdpa", 32), ("native", 32)])
def test_a_scale_of_each_query_and_its_gradient(shape: tuple[int, ...], impl: str, dtype: int) -> None:
    q, k, v = inputs(7, 10, torch.float64 if dtype == 64 else torch.float32)
    if impl == "native" and explain(q, k, v).reasons["native"]:
        pytest.skip("no native kernels here")
    scale = leaf(*shape, dtype=q.dtype)
    bias = leaf(7, 10, dtype=q.dtype)
    got = attend(q, k, v, causal, bias=bias, scale=scale, impl=impl)
    factor = scale.expand(1, 1, 1) if scale.dim() < 3 else scale
    scores = q @ repeated(k).mT * factor[..., None] + bias
    seen = torch.arange(3, 10)[:, None] >= torch.arange(10)
    expected = masked_softmax(scores, seen) @ repeated(v)
    assert_same(got, expected, [q, k, v, scale, bias], 1e-9 if dtype == 64 else 1e-4)


def test_a_temperature_compiled_soft_capped_and_of_a_half_precision_call() -> None:
    q, k, v = inputs(6, 6)
    scale = leaf(B, H, 6)

    def run() -> Tensor:
        return attend_partial(q, k, v, window(3) & causal, scale=scale, softcap=1.5, weights="sigmoid").out

    distance = torch.arange(6)[:, None] - torch.arange(6)
    scores = 1.5 * torch.tanh(q @ repeated(k).mT * scale[..., None] / 1.5)
    weights = torch.where((distance >= 0) & (distance <= 3), torch.sigmoid(scores), 0)
    assert_same(run(), weights @ repeated(v), [q, k, v, scale])
    torch._dynamo.reset()
    assert_same(torch.compile(run, fullgraph=True, backend="aot_eager")(), run(), [q, k, v, scale])
    half = [x.detach().bfloat16() for x in (q, k, v)]
    out = attend(*half, scale=scale.detach().float())
    assert out.dtype == torch.bfloat16
    expected = torch.softmax(half[0].double() @ repeated(half[1].double()).mT * scale[..., None], -1)
    torch.testing.assert_close(out.double(), expected @ repeated(half[2].double()), atol=0.06, rtol=0.06)


def test_a_plain_inference_call_does_not_lose_a_temperature() -> None:
    q, k, v = (x.detach().float() for x in inputs(6, 6))
    scale = torch.rand(1, H, 1)
    expected = torch.softmax(q @ repeated(k).mT * scale[..., None], -1) @ repeated(v)
    torch.testing.assert_close(attend(q, k, v, scale=scale), expected, atol=1e-5, rtol=1e-5)


def test_scales_of_other_shapes_are_refused() -> None:
    q, k, v = inputs(6, 6)
    for shape in ((H,), (6,), (B, H), (B, H, 5), (3, H, 6), (B, H, 6, 1)):
        with pytest.raises(ValueError, match="scale is a number, or"):
            attend(q, k, v, scale=torch.ones(shape, dtype=torch.float64))
    with pytest.raises(TypeError, match="float tensor"):
        explain(q, k, v, scale=torch.ones((), dtype=torch.long))


@pytest.mark.parametrize("gap", [(0, 3), (4, 6)], ids=["before", "between"])
def test_compiled_definitions_count_positions_beside_padding(gap: tuple[int, int]) -> None:
    q, k, v = inputs(9, 9)
    slopes, table = leaf(H), leaf(H, 7)
    mask = torch.ones(B, 9, dtype=torch.bool)
    mask[1, slice(*gap)] = False

    def run(mask: Tensor) -> Tensor:
        bias = [alibi(slopes), relative_table(table), score_function(lambda score, b, h, q, k: score * 0.5)]
        return attend(q, k, v, key_padding(mask) & causal, bias=bias).where(mask[:, None, :, None], 0)

    torch._dynamo.reset()
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(mask)
    position = mask.cumsum(1) - 1
    distance = (position[:, :, None] - position[:, None])[:, None]
    entries = table[torch.arange(H).view(H, 1, 1), distance.clamp(-3, 3) + 3]
    scores = (q @ repeated(k).mT / math.sqrt(D) - slopes.view(H, 1, 1) * distance.abs() + entries) / 2
    seen = mask[:, None, None] & (torch.arange(9)[:, None] >= torch.arange(9)) | ~mask[:, None, :, None]
    expected = (masked_softmax(scores, seen) @ repeated(v)).where(mask[:, None, :, None], 0)
    assert_same(got, expected, [q, k, v, slopes, table])
    assert_same(run(mask), expected, [q, k, v, slopes, table])
    if gap[0]:
        gates = torch.zeros(1, 1, 9, dtype=torch.float64)

        def decayed() -> Tensor:
            return attend(q, k, v, key_padding(mask) & causal, bias=log_decay(gates), impl="reference")

        with pytest.raises(ValueError, match="gates of padding"):
            torch.compile(decayed, backend="aot_eager")()
