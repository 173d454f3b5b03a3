"""Forgetting attention: a bias of running sums of log gates, in every implementation, against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import logsigmoid

from foveate import Packed, attend, attend_partial, causal, explain, full, log_decay, merge, sinks, softmax, window
from foveate.attention.call import prepare
from foveate.attention.impl.flex import attend_flex, plan
from foveate.kernels.cpu.loader import library

IMPLS = [
    "reference",
    "tiles",
    pytest.param("native", marks=pytest.mark.skipif(library() is None, reason="no native kernels")),
]


def draw(n: int, m: int, gates: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and log gates, two query heads to a key head."""
    q, k, v = torch.randn(2, 4, n, 8), torch.randn(2, 2, m, 8), torch.randn(2, 1, m, 5)
    made = [q.to(dtype), k.to(dtype), v.to(dtype), logsigmoid(2 + torch.randn(*gates, m)).to(dtype)]
    return [x.requires_grad_() for x in made]


def formula(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, seen: Tensor, softcap: float | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + D) v with D_ij the sum of log gates j + 1 .. i, pair by pair."""
    n, m = q.shape[2], k.shape[2]
    between = torch.arange(m) > torch.arange(m)[:, None, None]  # (j, -, l): l after j
    upto = torch.arange(m) <= (torch.arange(n) + m - n)[None, :, None]  # (-, i, l): l up to i
    decay = torch.einsum("bhl,jil->bhij", gates, (between & upto).to(gates.dtype))
    logits = q @ k.repeat_interleave(2, 1).mT / q.shape[3] ** 0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return torch.softmax((logits + decay).masked_fill(~seen, float("-inf")), -1) @ v


def results(run: Any, inputs: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    out = run(*inputs)
    return [out, *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gates", [(2, 4), (1, 4), (2, 1)])
@pytest.mark.parametrize(("n", "m"), [(1, 37), (37, 37), (70, 133)])
def test_value_and_every_gradient(impl: str, gates: tuple[int, int], n: int, m: int) -> None:
    for pattern, softcap in ((causal, None), (window(20) & causal | sinks(3), 2.0)):
        inputs = draw(n, m, gates)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        cotangent, seen = torch.randn(2, 4, n, 5), pattern.mask(n, m)
        truth = results(lambda *x, s=seen, c=softcap: formula(*x, s, c), exact, cotangent)
        got = results(
            lambda q, k, v, g, p=pattern, c=softcap: attend(q, k, v, p, bias=log_decay(g), softcap=c, impl=impl),
            inputs,
            cotangent,
        )
        for right, ours in zip(truth, got, strict=True):
            torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("impl", ["reference", "tiles"])
def test_exact_in_double_precision(impl: str) -> None:
    inputs = draw(50, 70, (2, 4), torch.float64)
    cotangent, seen = torch.randn(2, 4, 50, 5), causal.mask(50, 70)
    truth = results(lambda *x: formula(*x, seen), inputs, cotangent)
    got = results(lambda q, k, v, g: attend(q, k, v, causal, bias=log_decay(g), impl=impl), inputs, cotangent)
    for right, ours in zip(truth, got, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_small_gates_far_along_lose_no_digits(impl: str) -> None:
    """Sums reach -40,000, whose neighbours in float32 lie 0.004 apart; what counts are differences."""
    m = 4000
    q, k, v = torch.randn(3, 1, 1, m, 8)
    gates = -20 * torch.rand(1, 1, m)
    gates[..., -60:] /= 1000
    out = attend(q, k, v, causal, bias=log_decay(gates), impl=impl)[:, :, -50:]
    sums = gates.double().cumsum(-1)
    logits = q.double()[:, :, -50:] @ k.double().mT / 8**0.5 + sums[..., -50:, None] - sums[..., None, :]
    truth = torch.softmax(logits.masked_fill(~causal.mask(50, m), float("-inf")), -1) @ v.double()
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_agrees() -> None:
    inputs = [x.detach() for x in draw(70, 133, (2, 4))]
    q, k, v, gates = inputs
    values = v.repeat_interleave(2, 1)
    call, _ = prepare(q, k, values, causal, log_decay(gates), "softmax", None, None, None, needs_lse=True)
    out = attend_flex(plan(call), flex_attention).out
    torch.testing.assert_close(out, formula(*inputs, causal.mask(70, 133)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_decoded_packed_and_merged(impl: str) -> None:
    q, k, v, gates = (x.detach() for x in draw(90, 90, (2, 4)))
    whole = attend_partial(q, k, v, causal, bias=log_decay(gates), weights=softmax(sink=0.3), impl=impl)
    last = attend_partial(
        q[:, :, 60:61], k[:, :, :61], v[:, :, :61], causal, bias=log_decay(gates[..., :61]),
        weights=softmax(sink=0.3), impl=impl,
    )  # fmt: skip
    torch.testing.assert_close(last.out, whole.out[:, :, 60:61])
    assert last.lse is not None and whole.lse is not None
    torch.testing.assert_close(last.lse, whole.lse[:, :, 60:61])
    near, far = (
        attend_partial(q, k, v, pattern, bias=log_decay(gates), impl=impl)
        for pattern in (causal & window(9), causal & ~window(9))
    )
    torch.testing.assert_close(merge([near, far]).out, attend(q, k, v, causal, bias=log_decay(gates), impl=impl))
    packed = attend(q, k, v, causal, bias=log_decay(gates), layout=Packed([30, 60]), impl=impl)
    alone = attend(*(x[:, :, 30:] for x in (q, k, v)), causal, bias=log_decay(gates[..., 30:]), impl=impl)
    torch.testing.assert_close(packed[:, :, 30:], alone)


@pytest.mark.parametrize("impl", ["auto", "tiles"])
def test_compiles(impl: str) -> None:
    inputs = draw(70, 70, (2, 4))

    def run(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        return attend(q, k, v, window(30) & causal, bias=log_decay(gates), impl=impl)

    torch._dynamo.reset()
    cotangent = torch.randn(2, 4, 70, 5)
    expected = results(run, inputs, cotangent)
    got = results(torch.compile(run, fullgraph=True, backend="aot_eager"), inputs, cotangent)
    torch.testing.assert_close(got, expected)


def test_gates_of_zero_bias_nothing() -> None:
    q, k, v, gates = (x.detach() for x in draw(40, 40, (2, 4)))
    out = attend(q, k, v, causal, bias=log_decay(torch.zeros_like(gates)))
    torch.testing.assert_close(out, attend(q, k, v, causal))
    reasons = explain(q, k, k, causal, bias=log_decay(gates)).reasons
    assert reasons["sdpa"] == "it has dense biases only" and reasons["tiles"] is None


def test_refuses_in_words() -> None:
    q, k, v, gates = (x.detach() for x in draw(9, 9, (2, 4)))
    with pytest.raises(ValueError, match="looks back only, but full shows later keys"):
        attend(q, k, v, full, bias=log_decay(gates))
    for wrong in (gates[..., :8], gates[:, :3], torch.zeros(3, 4, 9)):
        with pytest.raises(ValueError, match="a gate for each key"):
            attend(q, k, v, causal, bias=log_decay(wrong))
    with pytest.raises(ValueError, match="queries that are among them"):
        attend(q, k[:, :, :5], v[:, :, :5], causal, bias=log_decay(gates[..., :5]))
    with pytest.raises(ValueError, match=r"log gates \(B, H, M\)"):
        log_decay(gates[0])
    with pytest.raises(TypeError, match="float tensor"):
        log_decay(gates.long())
