"""attend where tensors are more than memory: derivatives of derivatives, torch.func, traces, views, odd sizes."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from foveate import (
    Grid,
    alibi,
    attend,
    attend_partial,
    causal,
    document_numbers,
    full,
    key_padding,
    log_decay,
    neighborhood,
    relative_table,
    sigmoid,
    sinks,
    softmax,
    topk_blocks,
    window,
)
from foveate.kernels.cpu.loader import library

STATIC = window(2) & causal | sinks(2)
DYNAMIC = topk_blocks(3, k=1) | window(1) & causal
PATTERNS = (STATIC, causal, DYNAMIC)
IMPLS = ("tiles", "native") if library() is not None else ("tiles",)


def inputs(*lead: int, length: int = 7, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    q, k = torch.randn(*lead, 4, length, 3, dtype=dtype), torch.randn(*lead, 2, length, 3, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, torch.randn(*lead, 2, length, 5, dtype=dtype))]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor, kind: str, cap: float, sink: Tensor) -> Tensor:
    """The formula, over all pairs."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = cap * torch.tanh(q @ k.mT / q.shape[3] ** 0.5 / cap) + bias
    if kind == "sigmoid":
        return (torch.sigmoid(logits) * mask) @ v
    weights = torch.exp(logits) * mask
    return weights @ v / (weights.sum(-1, keepdim=True) + sink.exp().view(-1, 1, 1))


def penalty(out: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """Gradients of the squared gradients of a loss, as of a gradient penalty."""
    first = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
    return list(torch.autograd.grad(sum((x * x).sum() for x in first), wanted))


def options(name: str, p: Tensor, length: int) -> tuple[dict[str, Any], Tensor, str, float, Tensor]:
    """What attend takes, and the same for the formula: bias, kind, soft-cap and sink."""
    none, nowhere = p.sum() * 0, torch.full((1,), -torch.inf, dtype=p.dtype)
    far = (torch.arange(length).unsqueeze(1) - torch.arange(length)).to(p.dtype)
    if name == "sigmoid":
        return {"weights": sigmoid(bias=p[:, 0])}, p[:, 0, None, None], "sigmoid", 1e9, nowhere
    if name == "sink":
        return {"weights": softmax(sink=p[:, 0])}, none, "softmax", 1e9, p[:, 0]
    if name == "alibi":
        return {"bias": alibi(p[:, 0])}, -p[:, 0, None, None] * far.abs(), "softmax", 1e9, nowhere
    if name == "table":
        bias = p[:, (far.long().clamp(-2, 2) + 2)]
        return {"bias": relative_table(p)}, bias, "softmax", 1e9, nowhere
    if name == "dense":
        bias = p.sum(1)[:, None, None] * far.sin()
        return {"bias": bias}, bias, "softmax", 1e9, nowhere
    return {"softcap": 1.5}, none, "softmax", 1.5, nowhere


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["sigmoid", "sink", "alibi", "table", "dense", "softcap"])
def test_gradient_penalties_are_those_of_the_formula(name: str, impl: str) -> None:
    pattern = DYNAMIC if name == "softcap" else STATIC
    tensors = [*inputs(2), torch.randn(4, 5).requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    chosen = pattern.select(*tensors[:2]).to_dense()  # held fixed
    given, *_ = options(name, tensors[3], 7)
    got = penalty(attend(*tensors[:3], pattern, impl=impl, **given), tensors if name != "softcap" else tensors[:3])
    _, *rest = options(name, exact[3], 7)
    want = penalty(dense(*exact[:3], chosen, *rest), exact)
    for one, other in zip(got, want, strict=False):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("pattern", [STATIC, neighborhood(3)], ids=str)
def test_second_derivatives_are_those_of_finite_differences(pattern: Any) -> None:
    q, k, v = inputs(1, length=6, dtype=torch.float64)
    layout = Grid(6) if pattern.needs_axes else None

    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attend_partial(*x, pattern, layout=layout, impl="tiles")
        assert lse is not None
        return out, lse

    assert torch.autograd.gradgradcheck(run, (q, k, v), atol=1e-4, fast_mode=True)


@pytest.mark.skipif(library() is None, reason="there are no native kernels here")
def test_gradient_penalties_through_windows_of_a_grid() -> None:
    """Which have kernels of their own."""
    pattern, grid, (q, k, v) = neighborhood((3, 5)), Grid(9, 16), inputs(1, length=144)
    got = penalty(attend(q, k, v, pattern, layout=grid, impl="native"), [q, k, v])
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    none = torch.zeros(1, dtype=torch.float64)
    want = penalty(dense(*exact, pattern.mask(144, layout=grid), none, "softmax", 1e9, none - torch.inf), exact)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_second_derivatives_where_inputs_are_one_tensor_or_made_of_one_another() -> None:
    x = torch.randn(1, 2, 6, 4, requires_grad=True)

    def loss(x: Tensor, impl: str) -> Tensor:
        first = torch.autograd.grad(attend(x, x, x.sin(), causal, impl=impl).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first[0].square().sum(), x)[0]

    for impl in IMPLS:
        torch.testing.assert_close(loss(x, impl), loss(x, "reference"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", [alibi, lambda x: relative_table(x.view(2, 1)), lambda x: x.view(1, 2, 1, 1)])
def test_a_bias_changed_before_the_backward_pass_is_noticed(kind: Callable[[Tensor], Any], impl: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4, requires_grad=True).unbind()
    slopes = torch.rand(2)
    out = attend(q, k, v, bias=kind(slopes), impl=impl)
    slopes.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_vmap_equals_a_loop_with_gradients(pattern: Any) -> None:
    q, k, v = inputs(3, 1)
    bias = torch.randn(3, 4, 7, 7)
    for biases, dims in ((None, (0, 0, 0)), (bias[0], (0, 1, None)), (bias, (0, 0, 0))):
        values = v[0] if dims[2] is None else v
        run = torch.vmap(lambda q, k, v, b: attend(q, k, v, pattern, bias=b), (*dims, 0 if biases is bias else None))
        got = run(q, k.movedim(0, dims[1]), values, biases)
        each = [
            attend(q[i], k[i], v[0 if dims[2] is None else i], pattern, bias=biases[i] if biases is bias else biases)
            for i in range(3)
        ]
        torch.testing.assert_close(got, torch.stack(each))
        pairs = zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (got, torch.stack(each))), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # within torch.func
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("impl", ["auto", "tiles", "reference"])
def test_vmap_over_masks_and_numbers_of_documents(pattern: Any, impl: str) -> None:
    q, k, v = inputs(3, 2)
    real = torch.rand(3, 2, 7) < 0.7

    def padded(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        return attend(q, k, v, pattern & key_padding(real), impl=impl)

    def numbered(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        return attend(q, k, v, pattern & document_numbers(real.long()), impl=impl)

    for run in (padded, numbered):
        each = torch.stack([run(q[i], k[i], v[i], real[i]) for i in range(3)])
        torch.testing.assert_close(torch.vmap(run)(q, k, v, real), each)
    if impl == "auto":
        grad = torch.vmap(torch.func.grad(lambda *x: numbered(*x).square().sum()))(
            *(x.detach() for x in (q, k, v)), real
        )
        torch.testing.assert_close(grad, torch.autograd.grad(each.square().sum(), q)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["auto", "tiles"])
def test_vmap_beside_the_gates_of_a_batch(impl: str) -> None:
    q, k, v = inputs(3, 2)
    gates = -torch.rand(2, 4, 7)
    each = [attend(*x, causal, bias=log_decay(gates), impl=impl) for x in zip(q, k, v, strict=True)]
    got = torch.vmap(lambda q, k, v: attend(q, k, v, causal, bias=log_decay(gates), impl=impl))(q, k, v)
    torch.testing.assert_close(got, torch.stack(each))


@pytest.mark.parametrize("impl", ["auto", "tiles", "reference"])
def test_gates_of_padding_between_tokens_are_refused_in_graphs_too(impl: str) -> None:
    q, k, v = (x.detach() for x in inputs(1))
    gates, real = -torch.rand(1, 4, 7), torch.arange(7).unsqueeze(0) >= 2

    def run(real: Tensor) -> Tensor:
        return attend(q, k, v, causal & key_padding(real), bias=log_decay(gates), impl=impl)

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(real), run(real), rtol=1e-4, atol=1e-5)
    real[0, 4] = False
    for call in (run, compiled):
        with pytest.raises(ValueError, match="gates of padding"):
            call(real)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("biased", ["alibi", "table"])
def test_padding_between_tokens_is_no_distance_in_traces_either(biased: str, impl: str) -> None:
    q, k, v = (x.detach() for x in inputs(2))
    real = torch.rand(3, 2, 7) < 0.7
    slopes, table = torch.rand(4), torch.randn(4, 5)
    bias = alibi(slopes) if biased == "alibi" else relative_table(table)

    def run(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        out = attend(q, k, v, causal & key_padding(real), bias=bias, impl=impl)
        return out * real[:, None, :, None]  # what padding asks for means nothing

    def formula(real: Tensor) -> Tensor:
        place = real.long().cumsum(1)
        distance = (place.unsqueeze(2) - place.unsqueeze(1)).unsqueeze(1)
        clipped = distance.clamp(-2, 2).squeeze(1) + 2
        logits = -slopes.view(-1, 1, 1) * distance.abs() if biased == "alibi" else table[:, clipped].transpose(0, 1)
        mask = torch.ones(7, 7, dtype=torch.bool).tril() & real[:, None, None, :] & real[:, None, :, None]
        weights = torch.exp(q @ k.repeat_interleave(2, 1).mT / 3**0.5 + logits) * mask
        return (weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)) @ v.repeat_interleave(2, 1)

    want = torch.stack([formula(each) for each in real])
    torch.testing.assert_close(torch.stack([run(q, k, v, each) for each in real]), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.vmap(run, (None, None, None, 0))(q, k, v, real), want, rtol=1e-4, atol=1e-5)
    recorded, compiled = make_fx(run)(q, k, v, real[0]), torch.compile(run, backend="eager", fullgraph=True)
    for each, its in zip(real, want, strict=True):
        torch.testing.assert_close(recorded(q, k, v, each), its, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(q, k, v, each), its, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # within torch.func
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_derivatives_of_torch_func_and_in_forward_mode(pattern: Any) -> None:
    q, k, v = (x.detach() for x in inputs(3, 1))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, pattern).square().sum()

    want = []
    for x in zip(q, k, v, strict=True):
        leaf = x[0].clone().requires_grad_()
        want.append(torch.autograd.grad(loss(leaf, *x[1:]), leaf)[0])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(q, k, v), torch.stack(want), rtol=1e-4, atol=1e-5)
    t = torch.randn_like(q)
    along = (torch.stack(want) * t).sum()
    tangent = torch.func.jvp(lambda q: torch.vmap(loss)(q, k, v).sum(), (q,), (t,))[1]
    torch.testing.assert_close(tangent, along, rtol=1e-4, atol=1e-4)
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(q[0], t[0]), k[0], v[0])
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, (want[0] * t[0]).sum(), rtol=1e-4, atol=1e-4)
    hessian = torch.autograd.functional.hessian(lambda q: loss(q, k[0], v[0]), q[0])
    torch.testing.assert_close(torch.func.hessian(loss)(q[0], k[0], v[0]), hessian, rtol=1e-3, atol=1e-3)


def test_gradients_of_many_outputs_at_once() -> None:
    q, k, v = (x.detach() for x in inputs(1))

    def run(q: Tensor) -> Tensor:
        return attend(q, k, v, STATIC).sum((0, 3))

    one_by_one = torch.autograd.functional.jacobian(run, q)
    torch.testing.assert_close(torch.autograd.functional.jacobian(run, q, vectorize=True), one_by_one)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_traces_hold_the_call_and_not_its_result(pattern: Any) -> None:
    first, second = ([x.detach() for x in inputs(2)] for _ in range(2))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, pattern)

    want = run(*second)
    torch.testing.assert_close(make_fx(run)(*first)(*second), want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.testing.assert_close(torch.jit.trace(run, first)(*second), want)
    with FakeTensorMode() as mode:
        fake = run(*(mode.from_tensor(x) for x in first))
    assert (fake.shape, fake.dtype) == (want.shape, want.dtype)
    assert run(*(x.to("meta") for x in first)).shape == want.shape
    with FlopCounterMode(display=False):
        torch.testing.assert_close(run(*second), want)
    torch.testing.assert_close(run(*first), run(*(x.clone() for x in first)))  # nothing kept from a trace


class Marked(Tensor):
    """A subclass that adds nothing."""


def test_views_that_negate_and_subclasses_are_read_right() -> None:
    q, k, v = (x.detach() for x in inputs(2))
    for pattern, place in itertools.product((full, STATIC, DYNAMIC), range(3)):
        tensors = [q, k, v]
        want = attend(*(-x if i == place else x for i, x in enumerate(tensors)), pattern)
        tensors[place] = torch.complex(torch.zeros_like(tensors[place]), tensors[place]).conj().imag
        assert tensors[place].is_neg()
        torch.testing.assert_close(attend(*tensors, pattern), want)
        leaf = q.clone().requires_grad_()
        torch.testing.assert_close(attend(leaf, *tensors[1:], pattern).detach(), attend(q, *tensors[1:], pattern))
        out = attend(leaf, k, v, pattern)  # and of gradients
        upward = torch.complex(torch.zeros_like(out), out.detach()).conj().imag
        torch.testing.assert_close(
            torch.autograd.grad(out, leaf, upward, retain_graph=True), torch.autograd.grad(out, leaf, upward.clone())
        )
    torch.testing.assert_close(attend(q.as_subclass(Marked), k, v, STATIC).as_subclass(Tensor), attend(q, k, v, STATIC))


def test_layouts_of_memory_that_no_kernel_reads_are_refused_in_words() -> None:
    q, k, v = (x.detach() for x in inputs(2))
    for tensors in ((q.to_sparse(), k, v), (q, k.to_mkldnn(), v)):
        with pytest.raises(TypeError, match="dense tensor"):
            attend(*tensors, STATIC)
    with pytest.raises(NotImplementedError, match="reference"):
        torch.func.grad(lambda q: attend(q, k, v, impl="tiles").sum())(q)


@pytest.mark.parametrize("pattern", [*PATTERNS, key_padding(torch.ones(0, 7, dtype=torch.bool))], ids=str)
@pytest.mark.parametrize("impl", ["auto", "tiles", "reference"])
def test_nothing_in_nothing_out(pattern: Any, impl: str) -> None:
    for batch, heads, n, m, width in (
        (0, 4, 7, 7, 5),
        (2, 4, 0, 7, 5),
        (2, 4, 7, 0, 5),
        (2, 4, 7, 7, 0),
        (0, 4, 0, 0, 0),
    ):
        if pattern.tensors and (batch, m) != (0, 7):
            continue
        q, k = torch.randn(batch, heads, n, 3, requires_grad=True), torch.randn(batch, 2, m, 3, requires_grad=True)
        v = torch.randn(batch, 2, m, width, requires_grad=True)
        for weights in ("softmax", "sigmoid", softmax(sink=0.5)):
            out, lse = attend_partial(q, k, v, pattern, weights=weights, impl=impl)
            assert out.shape == (batch, heads, n, width) and not out.any()
            assert lse is None or lse.shape == (batch, heads, n)
            assert all(not x.any() for x in torch.autograd.grad(out.sum(), (q, k, v)))
        with torch.no_grad():
            assert attend(q, k, v, pattern).shape == out.shape


def test_second_derivatives_in_double_precision_by_default() -> None:
    q, k, v = inputs(1, length=6, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda *x: attend(*x, causal), (q, k, v), fast_mode=True)
