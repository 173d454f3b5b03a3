"""recur, scan and causal_conv where tensors are more than memory: derivatives of derivatives, torch.func, traces."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from foveate import causal_conv, linear_scan, recur, scan
from foveate.kernels.cpu.loader import library
from foveate.recurrence.ssm import evolve

Case = tuple[Callable[..., tuple[Tensor, Tensor]], list[Tensor]]
LENGTH = 7


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def recurrences(batch: int) -> dict[str, Case]:
    """Each with its inputs, made so that any numbers are allowed ones."""
    q, k, v = torch.randn(batch, 4, LENGTH, 3), torch.randn(batch, 2, LENGTH, 3), torch.randn(batch, 2, LENGTH, 2)
    constant, by_token = torch.randn(2), torch.randn(batch, 2, LENGTH)
    by_channel, state = torch.randn(batch, 2, LENGTH, 3), torch.randn(batch, 2, 3, 2)
    bonus = torch.randn(4, 3)
    pair = [torch.randn(batch, 2, LENGTH, 3) / 3 for _ in range(2)]
    return {
        "sum": (lambda q, k, v: recur(q, k, v), [q, k, v]),
        "constant": (lambda q, k, v, g: recur(q, k, v, decay=-g.exp()), [q, k, v, constant]),
        "token": (lambda q, k, v, g, s: recur(q, k, v, decay=-g.exp(), state=s), [q, k, v, by_token, state]),
        "channel": (lambda q, k, v, g: recur(q, k, v, decay=-g.exp()), [q, k, v, by_channel]),
        "bonus": (lambda q, k, v, g, u: recur(q, k, v, decay=-g.exp(), bonus=u), [q, k, v, by_channel, bonus]),
        "delta": (
            lambda q, k, v, g, b: recur(q, unit(k), v, decay=-g.exp(), beta=b.sigmoid()),
            [q, k, v, by_token, torch.randn(batch, 2, LENGTH)],
        ),
        "low rank": (
            lambda q, k, v, g, a, b: recur(q, k, v, decay=-g.exp(), low_rank=(a, b)),
            [q, k, v, by_channel, *pair],
        ),
    }


def scans(batch: int) -> dict[str, Case]:
    x, dt, z = torch.randn(3, batch, LENGTH, 4).unbind()
    A, B, C, D = torch.randn(4, 3), torch.randn(batch, LENGTH, 3), torch.randn(batch, LENGTH, 2, 3), torch.randn(4)
    state, tail = torch.randn(batch, 4, 3), torch.randn(batch, 4, 2)

    def selective(*t: Tensor) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C, D, z, bias, state = t
        return scan(x, dt, -A.exp(), B, C, D=D, z=z, dt_bias=bias, softplus=True, state=state)

    return {
        "scan": (selective, [x, dt, A, B, C, D, z, torch.randn(4), state]),
        "plain scan": (lambda x, dt, A, B, C: scan(x, dt.exp(), -A.exp(), B, C), [x, dt, A, B, C[:, :, 0]]),
        "linear": (lambda x, g, s: linear_scan(x, -g.exp(), state=s), [x, dt, state[:, :, 0]]),
        "conv": (
            lambda x, w, b, t: causal_conv(x, w, b, tail=t, activation="silu"),
            [x, torch.randn(4, 3), torch.randn(4), tail],
        ),
    }


def cases(batch: int = 2) -> dict[str, Case]:
    return {**recurrences(batch), **scans(batch)}


NAMES = list(cases())


def penalty(run: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Gradients of the squared gradients of a loss of both outputs."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    out, state = run(*leaves)
    first = torch.autograd.grad(out.square().sum() + state.sin().sum(), leaves, create_graph=True)
    return list(torch.autograd.grad(sum((x * x).sum() for x in first), leaves))


@pytest.mark.skipif(library() is None, reason="there are no native kernels here")
@pytest.mark.parametrize("name", NAMES)
def test_gradient_penalties_through_kernels_are_those_of_the_definition_in_float64(name: str) -> None:
    run, tensors = cases()[name]
    got, want = penalty(run, tensors, torch.float32), penalty(run, tensors, torch.float64)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-4 * float(other.abs().max()) + 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_those_of_finite_differences(name: str) -> None:
    run, tensors = cases(1)[name]
    leaves = [x.double().requires_grad_() for x in tensors]
    assert torch.autograd.gradgradcheck(lambda *t: tuple(run(*t)), leaves, fast_mode=True, atol=1e-4)


def test_second_derivatives_of_packed_sequences() -> None:
    q, k, v = torch.randn(3, 1, 2, LENGTH, 3).unbind()
    x, w = torch.randn(1, LENGTH, 4), torch.randn(4, 3)
    packed: list[tuple[Case, str]] = [
        ((lambda q, k, v: recur(q, k, v, lengths=[3, 0, 4]), [q, k, v]), "recur"),
        ((lambda x, g: linear_scan(x, -g.exp(), lengths=[3, 0, 4]), [x, x.flip(1)]), "linear"),
        ((lambda x, w: causal_conv(x, w, lengths=[3, 0, 4]), [x, w]), "conv"),
    ]
    for (run, tensors), _ in packed:
        got, want = (penalty(run, tensors, dtype) for dtype in (torch.float32, torch.float64))
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # within torch.func
@pytest.mark.parametrize("name", NAMES)
def test_transforms_of_torch_func_equal_loops(name: str) -> None:
    run, tensors = cases()[name]
    many = [torch.stack([x, x.roll(1, -1), -x]) for x in tensors]

    def loss(*t: Tensor) -> Tensor:
        out, state = run(*t)
        return out.square().sum() + state.sin().sum()

    each = [run(*t) for t in zip(*many, strict=True)]
    for got, want in zip(torch.vmap(run)(*many), zip(*each, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-5)
    gradients = []
    for t in zip(*many, strict=True):
        leaves = [x.clone().requires_grad_() for x in t]
        gradients.append(torch.autograd.grad(loss(*leaves), leaves))
    every = torch.vmap(torch.func.grad(loss, tuple(range(len(tensors)))))(*many)
    for got, want in zip(every, zip(*gradients, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-3, atol=1e-4 * float(got.abs().max()))
    along = sum((x * g).sum() for x, g in zip(tensors, gradients[0], strict=True))
    tangent = torch.func.jvp(loss, tuple(tensors), tuple(tensors))[1]
    torch.testing.assert_close(tangent, along, rtol=1e-3, atol=1e-3)
    with forward_ad.dual_level():
        dual = loss(*(forward_ad.make_dual(x, x) for x in tensors))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, along, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_traces_hold_the_call_and_not_its_result(name: str) -> None:
    run, first = cases()[name]
    second = [x.flip(-1) for x in first]
    want = tuple(run(*second))
    traced = make_fx(lambda *t: tuple(run(*t)))(*first)
    torch.testing.assert_close(traced(*second), want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.testing.assert_close(torch.jit.trace(lambda *t: tuple(run(*t)), first)(*second), want)
    with FakeTensorMode() as mode:
        fake = run(*(mode.from_tensor(x) for x in first))
    assert [x.shape for x in fake] == [x.shape for x in want]
    assert [x.shape for x in run(*(x.to("meta") for x in first))] == [x.shape for x in want]
    torch.testing.assert_close(tuple(run(*second)), want)


@pytest.mark.parametrize("name", NAMES)
def test_views_that_negate_are_read_negated(name: str) -> None:
    run, tensors = cases()[name]
    want = run(*tensors)
    for place in range(len(tensors)):
        given = list(tensors)
        given[place] = torch.complex(torch.zeros_like(given[place]), -given[place]).conj().imag
        for got, expected in zip(run(*given), want, strict=True):
            torch.testing.assert_close(got, expected)


def test_gates_changed_before_the_backward_pass_are_noticed() -> None:
    q, k, v = torch.randn(3, 1, 2, LENGTH, 3, requires_grad=True).unbind()
    decay, state = -torch.rand(1, 2, LENGTH), torch.zeros(1, 2, 3, 3)
    x, weight, first = torch.randn(1, LENGTH, 4, requires_grad=True), torch.randn(4, 3), torch.zeros(1, 4)
    calls: list[tuple[Callable[[], Tensor], Tensor]] = [
        (lambda: recur(q, k, v, decay=decay).out, decay),
        (lambda: recur(q, k, v, state=state).out, state),
        (lambda: linear_scan(x, -x.exp(), state=first).out, first),
        (lambda: causal_conv(x, weight).out, weight),
    ]
    for run, changed in calls:
        out = run()
        changed.mul_(0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward(retain_graph=True)


def test_state_spaces_have_second_derivatives_too() -> None:
    x, transition = torch.randn(1, 5, 2, dtype=torch.float64), torch.randn(2, 3, dtype=torch.complex128)

    def run(x: Tensor, t: Tensor, write: Tensor) -> Tensor:
        return evolve(x, torch.complex(-t.real.exp(), t.imag), write, write).out

    assert torch.autograd.gradgradcheck(
        run, [t.requires_grad_() for t in (x, transition, transition.flip(0).clone())], fast_mode=True, atol=1e-4
    )
