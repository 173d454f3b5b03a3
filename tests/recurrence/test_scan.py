"""scan, linear_scan and causal_conv: one definition, and everything that must amount to the same."""

from __future__ import annotations

import pytest
import torch
from tests.support.native_checks import one_thread
from tests.support.scan_inputs import (
    CARRIED,
    conv_call,
    linear_call,
    normal,
    outcome,
    part,
    scan_by_pairs,
    scan_call,
    states_by_pairs,
)
from torch import Tensor
from torch.nn.functional import conv1d, silu
from torch.testing import assert_close

from foveate import causal_conv, linear_scan, scan, scan_step
from foveate.kernels.cpu.loader import library
from foveate.options import forced_impl

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
EXACT = ("reference", "chunks")
IMPLS = (*EXACT, "native") if library() is not None else EXACT
CALLS = ((scan, scan_call), (linear_scan, linear_call), (causal_conv, conv_call))
every_impl = pytest.mark.parametrize("impl", IMPLS)
every_call = pytest.mark.parametrize(("operator", "make"), CALLS, ids=[operator.__name__ for operator, _ in CALLS])


def leaves(call: dict) -> dict:
    return {name: v.requires_grad_() if isinstance(v, Tensor) else v for name, v in call.items()}


def fitting(call: dict, impl: str) -> dict:
    """In the dtype that the implementation has."""
    dtype = torch.float32 if impl == "native" else torch.float64
    return {name: v.to(dtype) if isinstance(v, Tensor) else v for name, v in call.items()}


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("impl", EXACT)
def test_scan_is_its_sum_over_pairs(impl: str, softplus: bool, groups: int) -> None:
    call = scan_call(6, 3, 21, groups=groups) | {"softplus": softplus}
    if not softplus:
        call |= {"dt": call["dt"].abs(), "dt_bias": call["dt_bias"].abs()}
    out, state = scan(**call, impl=impl)
    expected, expected_state = scan_by_pairs(**call)
    assert_close(out, expected)
    assert_close(state, expected_state)


@pytest.mark.parametrize("impl", EXACT)
def test_linear_scan_is_its_sum_over_pairs(impl: str) -> None:
    call = linear_call(5, 23)
    call["decay"][0, 4], call["decay"][1, 9] = -torch.inf, -50
    expected = states_by_pairs(call["decay"].double(), call["x"], call["state"])
    out, state = linear_scan(**call, impl=impl)
    assert_close(out, expected.nan_to_num())
    assert_close(state, expected[:, -1])


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("impl", EXACT)
def test_convolution_is_a_causal_conv1d(impl: str, activation: str | None) -> None:
    call = conv_call(5, 4, 19) | {"activation": activation}
    out, tail = causal_conv(**call, impl=impl)
    seen = torch.cat([call["tail"], call["x"].mT], 2)
    expected = conv1d(seen, call["weight"].unsqueeze(1), call["bias"], groups=5).mT
    assert_close(out, silu(expected) if activation else expected)
    assert_close(tail, seen[:, :, -3:])


@pytest.mark.parametrize(("channels", "states", "length", "groups"), [(1, 1, 1, 1), (6, 3, 130, 3), (3, 17, 65, 1)])
def test_chunks_give_the_reference_and_its_gradients(channels: int, states: int, length: int, groups: int) -> None:
    call = leaves(scan_call(channels, states, length, groups=groups))
    assert_close(outcome(scan, call, "chunks"), outcome(scan, call, "reference"))
    call = leaves(linear_call(channels, 5 * length))
    assert_close(outcome(linear_scan, call, "chunks"), outcome(linear_scan, call, "reference"))
    call = leaves(conv_call(channels, states, length))
    assert_close(outcome(causal_conv, call, "chunks"), outcome(causal_conv, call, "reference"))


@every_impl
@every_call
def test_states_carried_over_a_split_give_the_whole(operator, make, impl: str) -> None:
    call, carried = fitting(make(length=131), impl), CARRIED[operator]
    whole = operator(**call, impl=impl)
    first = operator(**part(operator, call, 0, 67), impl=impl)
    second = operator(**part(operator, call, 67, 131, **{carried: first[1]}), impl=impl)
    assert_close(torch.cat([first.out, second.out], 1), whole.out)
    assert_close(second[1], whole[1])


@every_impl
@every_call
def test_token_by_token_gives_the_whole(operator, make, impl: str) -> None:
    call, carried = fitting(make(length=9), impl), CARRIED[operator]
    whole = operator(**call, impl=impl)
    state, step = call[carried], scan_step if operator is scan else operator
    outs = []
    for t in range(9):
        out, state = step(**part(operator, call, t, t + 1, **{carried: state}), impl=impl)
        outs.append(out)
    assert_close(torch.cat(outs, 1), whole.out)
    assert_close(state, whole[1])


@every_impl
@every_call
def test_packed_sequences_are_separate(operator, make, impl: str) -> None:
    lengths, carried = [3, 0, 70, 1, 0], CARRIED[operator]
    call = fitting(make(length=sum(lengths), batch=1), impl)
    call[carried] = torch.cat([torch.randn_like(call[carried]) for _ in lengths])
    call = leaves({name: v.detach() if isinstance(v, Tensor) else v for name, v in call.items()})
    packed = outcome(operator, call | {"lengths": lengths}, impl)
    outs, states, start = [], [], 0
    for i, length in enumerate(lengths):
        piece = part(operator, call, start, start + length, **{carried: call[carried][i : i + 1]})
        out, state = operator(**piece, impl=impl)
        outs, states, start = [*outs, out], [*states, state], start + length
    assert_close(packed["out"], torch.cat(outs, 1))
    assert_close(packed["carried"], torch.cat(states))
    assert_close(packed["carried"][1], call[carried][1], msg="an empty sequence changes no state")


@every_impl
@every_call
def test_no_tokens_leave_the_state(operator, make, impl: str) -> None:
    call, carried = leaves(fitting(make(length=0), impl)), CARRIED[operator]
    found = outcome(operator, call, impl)
    assert found["out"].shape == call["x"].shape
    assert torch.equal(found["carried"], call[carried])
    nobody = fitting(make(length=5, batch=0), impl)
    assert operator(**nobody, impl=impl).out.shape == nobody["x"].shape


@every_impl
def test_a_reset_forgets_exactly(impl: str) -> None:
    call = fitting(linear_call(5, 140), impl)
    call["decay"][:, 70] = -torch.inf
    call["x"][:, 65], call["state"][:] = 1e30, 1e30
    fresh = linear_scan(call["x"][:, 70:], call["decay"][:, 70:], impl=impl).out
    call = leaves(call)
    out, _ = linear_scan(**call, impl=impl)
    assert_close(out[:, 70:], fresh)
    grads = torch.autograd.grad(out[:, 70:].sum(), [call["x"], call["state"], call["decay"]])
    assert not grads[0][:, :70].any() and not grads[1].any()
    assert grads[2].isfinite().all()


@every_impl
def test_strong_decays_neither_overflow_nor_cancel(impl: str) -> None:
    call = fitting(scan_call(5, 3, 130), impl)
    call |= {"A": -(10 ** torch.linspace(-6, 6, 15).view(5, 3).to(call["x"].dtype)), "softplus": False, "z": None}
    call |= {"dt": call["dt"].abs(), "dt_bias": None}
    found = scan(**call, impl=impl)
    double = {name: v.double() if isinstance(v, Tensor) else v for name, v in call.items()}
    expected = scan(**double, impl="reference")
    assert_close(found.out.double(), expected.out, rtol=1e-5, atol=1e-4)
    assert_close(found.state.double(), expected.state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS[1:])
@torch.no_grad()
def test_a_hundred_thousand_tokens_near_decay_1_do_not_drift(impl: str) -> None:
    length, channels = 100_000, 4
    x = torch.rand(1, length, channels)
    rates = -torch.tensor([[1e-6], [3e-6], [1.1e-5], [0.0]])
    ones = torch.ones(1, length, 1)
    state = scan(x, torch.ones_like(x), rates, ones, ones, impl=impl).state
    linear = linear_scan(x, rates.view(1, 1, -1).expand_as(x), impl=impl).state
    left = torch.arange(length - 1, -1, -1, dtype=torch.float64).unsqueeze(-1) * rates.double().T
    expected = (x.double()[0] * left.exp()).sum(0)
    assert_close(state.double().flatten(), expected, rtol=2e-4, atol=0.0)
    assert_close(linear.double().flatten(), expected, rtol=2e-4, atol=0.0)


@every_impl
@every_call
def test_inputs_and_states_are_not_written_to(operator, make, impl: str) -> None:
    call = fitting(make(), impl)
    before = {name: v.clone() for name, v in call.items() if isinstance(v, Tensor)}
    operator(**call, impl=impl)
    for name, v in before.items():
        assert torch.equal(call[name], v), name


@every_impl
def test_half_precision_under_autocast_keeps_float32_states(impl: str) -> None:
    call = {name: v.bfloat16() if isinstance(v, Tensor) else v for name, v in scan_call().items()}
    call["state"] = call["state"].float()
    plain = scan(**call, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = scan(**call, impl=impl)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, plain.out) and torch.equal(state, plain.state)


def good() -> dict:
    return scan_call(6, 3, 5, groups=2)


REFUSED = (
    ({"A": torch.ones(6, 3)}, ValueError, "A must be at most 0, but reaches 1"),
    ({"A": -torch.ones(5, 3)}, ValueError, r"A must be \(C, S\) with C = 6"),
    ({"dt": normal(2, 5, 5)}, ValueError, r"dt must have x's shape \(2, 5, 6\)"),
    ({"dt": -torch.ones(2, 5, 6), "softplus": False, "dt_bias": None}, ValueError, "is softplus=True missing"),
    ({"B": normal(2, 5, 4, 3)}, ValueError, "B has 4 groups, which do not divide the 6 channels"),
    ({"C": normal(2, 5, 4)}, ValueError, r"C must be \(B, N, S\) or .* got \(2, 5, 4\)"),
    ({"D": normal(5)}, ValueError, r"D must be \(C,\) with C = 6"),
    ({"z": normal(2, 4, 6)}, ValueError, "z must have x's shape"),
    ({"z": torch.ones(2, 5, 6, dtype=torch.int64)}, TypeError, "z must have a real floating dtype, got torch.int64"),
    ({"A": -torch.ones(6, 3, dtype=torch.complex64)}, TypeError, "A must have a real floating dtype"),
    ({"state": normal(2, 6, 4)}, ValueError, r"state must be \(sequences, C, S\) = \(2, 6, 3\)"),
    ({"state": torch.zeros(2, 6, 3)}, TypeError, "state must be torch.float64 for these inputs"),
    ({"lengths": [5, 5]}, ValueError, "packed sequences need batch size 1, got 2"),
    ({"x": normal(5, 6)}, ValueError, r"x must be \(batch, tokens, channels\)"),
    ({"impl": "triton"}, ValueError, "impl is 'auto' or one of native, chunks, reference; got 'triton'"),
    ({"impl": "native"}, NotImplementedError, "float64|kernels"),
)


@pytest.mark.parametrize(("change", "error", "words"), REFUSED, ids=[words for _, _, words in REFUSED])
def test_scan_refuses_in_words(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        scan(**(good() | change))


def test_the_others_refuse_in_words() -> None:
    x = torch.ones(1, 4, 3)
    with pytest.raises(ValueError, match="decay must be at most 0, but reaches 1: it is a logarithm"):
        linear_scan(x, x)
    with pytest.raises(ValueError, match=r"state must be \(sequences, C\) = \(1, 3\), got \(3,\)"):
        linear_scan(x, -x, state=torch.zeros(3))
    with pytest.raises(ValueError, match="lengths sum to 3, but x has 4 tokens"):
        linear_scan(x, -x, lengths=[1, 2])
    with pytest.raises(ValueError, match=r"each be 0 or more; got \[5, -1\]"):
        linear_scan(x, -x, lengths=[5, -1])
    with pytest.raises(ValueError, match=r"pass weight.squeeze\(1\)"):
        causal_conv(x, torch.ones(3, 1, 4))
    with pytest.raises(ValueError, match='activation must be None or "silu"'):
        causal_conv(x, torch.ones(3, 4), activation="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tail must be \(sequences, C, width - 1\) = \(1, 3, 3\)"):
        causal_conv(x, torch.ones(3, 4), tail=torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match="scan_step takes one token"):
        scan_step(x, x, -torch.ones(3, 2), torch.ones(1, 4, 2), torch.ones(1, 4, 2))


def test_a_forced_implementation_is_taken() -> None:
    call = {name: v.float() if isinstance(v, Tensor) else v for name, v in scan_call().items()}
    for impl in IMPLS:
        with forced_impl(impl):
            assert torch.equal(scan(**call).out, scan(**call, impl=impl).out)
