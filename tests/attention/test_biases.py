"""Several biases at once: added up by every implementation, in packs, beside padding, in parts and when compiled."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import (
    Beside,
    Grid,
    Packed,
    alibi,
    attend,
    attend_partial,
    causal,
    explain,
    full,
    key_padding,
    log_decay,
    relative_table,
    sigmoid,
    softmax,
    window,
)
from foveate.mixers.core import PatternCore
from foveate.mixers.exact_io.chunked import ChunkedCore
from foveate.mixers.exact_io.sigmoid_attention import SigmoidAttention
from foveate.mixers.static_sparse.delta_attention import DeltaCore

B, H, G, D = 2, 4, 2, 7


class Inputs:
    """Random q, k, v and four kinds of biases for N queries, the last of M positions, with dense formulas."""

    def __init__(self, n: int, m: int, dtype: torch.dtype = torch.float64) -> None:
        def leaf(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=dtype, requires_grad=True)

        self.n, self.m = n, m
        self.q, self.k, self.v = leaf(B, H, n, D), leaf(B, G, m, D), leaf(B, G, m, D + 2)
        self.dense, self.row = leaf(B, 1, n, m), leaf(H, n, 1)
        self.slopes, self.table = leaf(H), leaf(H, 11)
        self.gates = torch.rand(B, H, m, dtype=dtype).add(0.3).log().clamp_max(0).requires_grad_()
        self.own = leaf(H)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, self.dense, self.row, self.slopes, self.table]

    def biases(self) -> list[Any]:
        return [self.dense, alibi(self.slopes), self.row, relative_table(self.table)]

    def positions(self) -> Tensor:
        return torch.arange(self.m)

    def logits(self, position: Tensor) -> Tensor:
        """q k / sqrt(D) and all of biases(), (B, H, N, M), where slot j is at position[..., j]."""
        k = self.k.repeat_interleave(H // G, 1)
        distance = position[..., -self.n :, None] - position[..., None, :]
        if distance.dim() == 3:
            distance = distance[:, None]
        by_head = self.slopes.view(H, 1, 1)
        entry = distance.clamp(-5, 5) + 5
        heads = torch.arange(H).view(H, 1, 1)
        biases = self.dense + self.row - by_head * distance.abs() + self.table[heads, entry]
        return self.q @ k.mT / math.sqrt(D) + biases

    def weighted(self, weights: Tensor) -> Tensor:
        return weights @ self.v.repeat_interleave(H // G, 1)


def softmax_over(logits: Tensor, seen: Tensor) -> Tensor:
    seen = seen.expand_as(logits)
    logits = torch.where(seen, logits, -1e9)
    weights = torch.where(seen, (logits - logits.detach().amax(-1, keepdim=True)).exp(), 0)
    return weights / torch.where(seen.any(-1, keepdim=True), weights.sum(-1, keepdim=True), 1)


def assert_same(got: Tensor, expected: Tensor, leaves: list[Tensor], tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    cotangent = torch.randn_like(expected)
    pairs = (torch.autograd.grad((x * cotangent).sum(), leaves) for x in (got, expected))
    for one, other in zip(*pairs, strict=True):
        assert other.abs().sum() > 0
        torch.testing.assert_close(one, other, atol=tolerance * 10, rtol=tolerance * 10)


@pytest.mark.parametrize(("impl", "dtype"), [("reference", 64), ("tiles", 64), ("native", 32)])
@pytest.mark.parametrize(("n", "m"), [(67, 67), (5, 71)])
def test_several_biases_add_up(impl: str, dtype: int, n: int, m: int) -> None:
    x = Inputs(n, m, torch.float64 if dtype == 64 else torch.float32)
    if impl == "native" and explain(x.q, x.k, x.v).reasons["native"]:
        pytest.skip("no native kernels here")
    position = x.positions()
    distance = position[-n:, None] - position
    seen = (distance >= 0) & (distance <= 40)
    got = attend(x.q, x.k, x.v, window(40) & causal, bias=x.biases(), impl=impl)
    expected = x.weighted(softmax_over(x.logits(position), seen))
    assert_same(got, expected, x.leaves, 1e-9 if dtype == 64 else 2e-4)


def test_sdpa_adds_up_dense_ones() -> None:
    x = Inputs(9, 13, torch.float32)
    got = attend(x.q, x.k, x.v, bias=(x.dense, x.row, x.dense), impl="sdpa")
    k = x.k.repeat_interleave(H // G, 1)
    logits = x.q @ k.mT / math.sqrt(D) + 2 * x.dense + x.row
    assert_same(got, x.weighted(torch.softmax(logits, -1)), [x.q, x.k, x.v, x.dense, x.row], 2e-4)


def test_one_in_a_list_and_none_are_as_without() -> None:
    x = Inputs(6, 6)
    torch.testing.assert_close(attend(x.q, x.k, x.v, bias=[x.dense]), attend(x.q, x.k, x.v, bias=x.dense))
    torch.testing.assert_close(attend(x.q, x.k, x.v, bias=[]), attend(x.q, x.k, x.v))


@pytest.mark.parametrize("impl", ["reference", "tiles", "native"])
def test_sigmoids_own_bias_stands_beside_others_and_decay_too(impl: str) -> None:
    x = Inputs(33, 33, torch.float32 if impl == "native" else torch.float64)
    if impl == "native" and explain(x.q, x.k, x.v).reasons["native"]:
        pytest.skip("no native kernels here")
    bias = [alibi(x.slopes), log_decay(x.gates), x.dense]
    got = attend(x.q, x.k, x.v, causal, bias=bias, weights=sigmoid(bias=x.own), impl=impl)
    at = torch.arange(33)
    sums = x.gates.cumsum(-1)
    k = x.k.repeat_interleave(H // G, 1)
    logits = x.q @ k.mT / math.sqrt(D) - x.slopes.view(H, 1, 1) * (at[:, None] - at).abs()
    logits = logits + sums[..., :, None] - sums[..., None, :] + x.dense + x.own.view(H, 1, 1)
    expected = x.weighted(torch.where(at[:, None] >= at, torch.sigmoid(logits), 0))
    leaves = [x.q, x.k, x.v, x.slopes, x.gates, x.dense, x.own]
    assert_same(got, expected, leaves, 1e-4 if impl == "native" else 1e-9)


@pytest.mark.parametrize("impl", ["reference", "tiles"])
def test_in_packs_and_beside_padding_they_count_positions(impl: str) -> None:
    x = Inputs(31, 31)
    lengths = [9, 1, 21]
    text = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    seen = (text[:, None] == text) & (torch.arange(31)[:, None] >= torch.arange(31))
    got = attend(x.q, x.k, x.v, causal, bias=x.biases(), layout=Packed(lengths), impl=impl)
    assert_same(got, x.weighted(softmax_over(x.logits(x.positions()), seen)), x.leaves)

    mask = torch.ones(B, 31, dtype=torch.bool)
    mask[0, 11:17], mask[1, :5] = False, False
    got = attend(x.q, x.k, x.v, key_padding(mask) & causal, bias=x.biases(), impl=impl)
    seen = (mask[:, None] & (torch.arange(31)[:, None] >= torch.arange(31)))[:, None]
    expected = x.weighted(softmax_over(x.logits(mask.cumsum(1) - 1), seen))
    real = mask[:, None, :, None]
    assert_same(got.where(real, 0), expected.where(real, 0), x.leaves)


@pytest.mark.parametrize(
    "core", [ChunkedCore(5, 3), DeltaCore(PatternCore(full), stride=4)], ids=lambda c: type(c).__name__
)
def test_cores_that_work_in_parts_take_several(core: Any) -> None:
    x = Inputs(13, 13)
    seen = torch.arange(13)[:, None] >= torch.arange(13)
    expected = x.weighted(softmax_over(x.logits(x.positions()), seen))
    torch.testing.assert_close(core(x.q, x.k, x.v, within=causal, bias=x.biases()), expected)


def test_compiled_to_one_graph() -> None:
    x = Inputs(15, 15)

    def run() -> Tensor:
        return attend(x.q, x.k, x.v, window(9) & causal, bias=x.biases(), weights=softmax(sink=0.5))

    torch._dynamo.reset()
    assert_same(torch.compile(run, fullgraph=True, backend="aot_eager")(), run(), x.leaves)


def test_gates_of_each_entry_stay_with_it_under_vmap() -> None:
    x = Inputs(8, 8)
    q = torch.randn(3, B, H, 8, D, dtype=torch.float64)

    def run(q: Tensor) -> Tensor:
        return attend(q, x.k, x.v, causal, bias=[log_decay(x.gates), alibi(x.slopes)], weights="sigmoid")

    torch.testing.assert_close(torch.vmap(run)(q), torch.stack([run(one) for one in q]))


def test_each_of_several_is_checked() -> None:
    x = Inputs(6, 6)
    with pytest.raises(TypeError, match="or a list of such; got str"):
        attend(x.q, x.k, x.v, bias=[x.dense, "alibi"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="broadcast"):
        attend(x.q, x.k, x.v, bias=[alibi(x.slopes), torch.zeros(5, 6, dtype=torch.float64)])
    with pytest.raises(ValueError, match="looks back only"):
        attend_partial(x.q, x.k, x.v, bias=[x.dense, log_decay(x.gates)])
    with pytest.raises(ValueError, match="pass a tensor"):
        table = relative_table(torch.zeros(H, 3, 3, dtype=torch.float64), dims=(2, 2))
        attend(x.q, x.k, x.v, bias=[x.dense, table], layout=Beside(Grid(2, 2), before=1, after=1))
    reasons = explain(x.q, x.k, x.v, bias=[x.dense, alibi(x.slopes)]).reasons
    assert reasons["sdpa"] == "it has dense biases only"


def test_sigmoid_attention_takes_alibi_beside_its_log_n() -> None:
    mixer = SigmoidAttention(12, 3, alibi=True).double()
    x = torch.randn(2, 11, 12, dtype=torch.float64)
    heads = (layer(x).view(2, 11, 3, 4).transpose(1, 2) for layer in (mixer.to_q, mixer.to_k, mixer.to_v))
    q, k, v = heads
    at = torch.arange(11)
    slopes = torch.tensor([2 ** (-8 * (h + 1) / 3) for h in range(3)], dtype=torch.float64).view(3, 1, 1)
    logits = q @ k.mT / 2 - slopes * (at[:, None] - at).abs() - torch.log(at.double() + 1)[:, None]
    out = torch.where(at[:, None] >= at, torch.sigmoid(logits), 0) @ v
    expected = mixer.to_out(out.transpose(1, 2).reshape(2, 11, 12))
    torch.testing.assert_close(mixer(x), expected)
    state, steps = mixer.init_state(2), []
    for token in x.unbind(1):
        out, state = mixer.decode(token.unsqueeze(1), state)
        steps.append(out)
    torch.testing.assert_close(torch.cat(steps, 1), expected)
