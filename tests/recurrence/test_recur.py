"""All forms of `recur` compute one thing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.support.recur_inputs import (
    DECAYS,
    UPDATES,
    Inputs,
    cut,
    fresh_generator,
    has_time,
    make_inputs,
    plain_recur,
    recur,
    step,
)
from torch.testing import assert_close

from foveate.recurrence import Recurrent

HEADS = {
    "equal": (4, 4, 4, 4),
    "one key and value": (4, 1, 1, 1),
    "one key and value, own decays": (4, 1, 1, 4),
    "one key, grouped values": (4, 1, 2, 2),
    "grouped keys, one value": (4, 2, 1, 1),
    "nothing nests": (12, 2, 3, 4),
}

every_decay = pytest.mark.parametrize("decay", DECAYS)
every_update = pytest.mark.parametrize("update", UPDATES)
every_impl = pytest.mark.parametrize("impl", ["reference", "chunks", "auto"])


def assert_same(actual: Recurrent, expected: Recurrent | tuple) -> None:
    assert_close(actual.out, expected[0], rtol=1e-9, atol=1e-10)
    assert_close(actual.state, expected[1], rtol=1e-9, atol=1e-10)


@every_decay
@every_update
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@every_impl
def test_is_the_product_of_the_tokens_matrices(decay: str, update: str, heads: tuple, impl: str) -> None:
    inputs = make_inputs(decay, update, heads=heads, length=37)
    out, state = plain_recur(**inputs)
    actual = recur(**inputs, impl=impl, chunk=16)
    assert_close(actual.out, out)
    assert_close(actual.state.repeat_interleave(heads[0] // actual.state.size(1), 1), state)


@every_decay
@every_update
@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_chunks_equal_the_reference(decay: str, update: str, chunk: int) -> None:
    for length in (1, 2, 3, 5, 63, 64, 65, 130):
        inputs = make_inputs(decay, update, length=length)
        assert_same(recur(**inputs, impl="chunks", chunk=chunk), recur(**inputs, impl="reference"))


@every_decay
@every_update
def test_chunks_equal_the_reference_over_more_than_one_span(decay: str, update: str) -> None:
    inputs = make_inputs(decay, update, batch=1, heads=(2, 1, 1, 2), length=1024 + 70, dims=(3, 2), strength=0.1)
    assert_same(recur(**inputs, impl="chunks"), recur(**inputs, impl="reference"))


@every_update
@pytest.mark.parametrize("dims", [(1, 33), (33, 1), (1, 1), (7, 33)])
def test_any_two_head_dims(update: str, dims: tuple[int, int]) -> None:
    for decay in DECAYS:
        inputs = make_inputs(decay, update, length=37, dims=dims)
        assert_same(recur(**inputs, impl="chunks", chunk=16), recur(**inputs, impl="reference"))


@every_decay
@every_update
def test_step_by_step_equals_at_once(decay: str, update: str) -> None:
    inputs = make_inputs(decay, update, heads=(4, 2, 2, 4), length=9)
    outs, state = [], inputs["state"]
    for t in range(9):
        out, state = step(**{**cut(inputs, t, t + 1), "state": state})
        outs.append(out)
    assert_same(Recurrent(torch.cat(outs, 2), state), recur(**inputs, impl="chunks"))


@every_decay
@every_update
@every_impl
@pytest.mark.parametrize("at", [0, 1, 40, 65])
def test_handing_the_state_over_equals_one_call(decay: str, update: str, impl: str, at: int) -> None:
    inputs = make_inputs(decay, update, length=65)
    first = recur(**cut(inputs, 0, at), impl=impl, chunk=16)
    second = recur(**{**cut(inputs, at, 65), "state": first.state}, impl=impl, chunk=16)
    together = Recurrent(torch.cat((first.out, second.out), 2), second.state)
    assert_same(together, recur(**inputs, impl=impl, chunk=16))


@every_decay
@every_update
@every_impl
def test_packed_equals_separate(decay: str, update: str, impl: str) -> None:
    lengths = (5, 0, 17, 1, 42, 0)
    inputs = make_inputs(decay, update, batch=1, heads=(4, 2, 2, 4), length=65)
    states = torch.randn(6, *inputs["state"].shape[1:], dtype=torch.float64, generator=fresh_generator())
    packed = recur(**{**inputs, "state": states}, lengths=lengths, impl=impl, chunk=16)
    start = 0
    for i, length in enumerate(lengths):
        inputs_i = {**cut(inputs, start, start + length), "state": states[i : i + 1]}
        expected = recur(**inputs_i, impl=impl, chunk=16)
        actual = Recurrent(packed.out[:, :, start : start + length], packed.state[i : i + 1])
        assert_same(actual, expected)
        start += length


@every_impl
def test_without_causality_every_query_reads_the_sum(impl: str) -> None:
    inputs = make_inputs(heads=(4, 2, 1, 1), length=37)
    k, v = (inputs[name][:, :, :21] for name in "kv")
    actual = recur(q=inputs["q"], k=k, v=v, state=inputs["state"], causal=False, impl=impl)
    k, v = (x.repeat_interleave(4 // x.size(1), 1) for x in (k, v))
    total = inputs["state"].repeat_interleave(2, 1) + k.mT @ v
    assert_close(actual.out, 7**-0.5 * inputs["q"] @ total)
    assert_close(actual.state, total[:, ::2])


@every_impl
def test_without_causality_packed_equals_separate(impl: str) -> None:
    inputs = make_inputs(batch=1, length=20)
    inputs.pop("state")
    packed = recur(**inputs, lengths=(8, 0, 12), causal=False, impl=impl)
    last = recur(**cut(inputs, 8, 20), causal=False, impl=impl)
    assert_same(Recurrent(packed.out[:, :, 8:], packed.state[2:]), last)
    assert_close(packed.state[1], torch.zeros_like(packed.state[1]))


@every_update
@every_impl
def test_no_tokens_leave_the_state_alone(update: str, impl: str) -> None:
    inputs = make_inputs("token", update, length=0)
    out, state = recur(**inputs, impl=impl)
    assert out.shape == (2, 2, 0, 5)
    assert_close(state, inputs["state"], rtol=0, atol=0)


@every_decay
@every_update
def test_no_future_token_reaches_an_output(decay: str, update: str) -> None:
    inputs = make_inputs(decay, update, length=65)
    past, future = cut(inputs, 0, 30), cut(make_inputs(decay, update, length=65), 30, 65)
    spliced = {name: torch.cat((x, future[name]), 2) if has_time(name, x) else x for name, x in past.items()}
    before, after = (recur(**x, impl="chunks", chunk=16).out for x in (inputs, spliced))
    assert_close(before[:, :, :30], after[:, :, :30], rtol=0, atol=0)
    assert not torch.equal(before[:, :, 30], after[:, :, 30])


def test_a_reset_forgets_everything_before_it() -> None:
    inputs = make_inputs("channel", "delta", length=65)
    inputs["decay"][:, :, 30] = -torch.inf
    fresh = {**cut(inputs, 30, 65), "state": None}
    whole, tail = (recur(**x, impl="chunks", chunk=16) for x in (inputs, fresh))
    assert_same(Recurrent(whole.out[:, :, 30:], whole.state), tail)


def test_the_scale_multiplies_the_output() -> None:
    inputs = make_inputs("token", "delta")
    assert_close(recur(**inputs, scale=3.0).out, 3 * 7**0.5 * recur(**inputs).out)
    one = cut(inputs, 0, 1)
    assert_close(step(**one, scale=3.0).out, 3 * 7**0.5 * step(**one).out)


def test_no_state_is_a_state_of_zeros() -> None:
    inputs = make_inputs("token", "delta")
    zeros = torch.zeros_like(inputs["state"])
    assert_same(recur(**{**inputs, "state": None}), recur(**{**inputs, "state": zeros}))


@every_decay
@every_update
@every_impl
def test_strides_do_not_matter_and_inputs_are_not_written_to(decay: str, update: str, impl: str) -> None:
    inputs = make_inputs(decay, update, length=37)
    scattered = {name: _scattered(x) for name, x in inputs.items()}
    assert not scattered["q"].is_contiguous()
    assert_same(recur(**scattered, impl=impl, chunk=16), recur(**inputs, impl=impl, chunk=16))
    assert all(torch.equal(scattered[name], inputs[name]) for name in inputs)


def _scattered(x: torch.Tensor) -> torch.Tensor:
    """The same values with the time axis before the heads, every second element of a larger tensor."""
    if x.dim() < 3:
        return torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]
    buffer = torch.full((*x.transpose(1, 2).shape, 2), torch.nan, dtype=x.dtype)
    view = buffer[..., 0].transpose(1, 2)
    view.copy_(x)
    return view


def test_shapes_follow_on_the_meta_device() -> None:
    inputs = {name: x.to("meta") for name, x in make_inputs("token", "delta").items()}
    out, state = recur(**inputs)
    assert out.is_meta
    assert (out.shape, state.shape) == ((2, 2, 65, 5), (2, 2, 7, 5))


@pytest.mark.parametrize(
    ("decay", "update", "backend"), [("channel", "additive", "eager"), ("head", "delta", "aot_eager")]
)
def test_compiles_into_one_graph_with_its_backward(decay: str, update: str, backend: str) -> None:
    inputs = make_inputs(decay, update, length=20, dtype=torch.float32)
    compiled = torch.compile(recur, fullgraph=True, dynamic=False, backend=backend)
    actual, expected = (with_gradient(f, inputs) for f in (compiled, recur))
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def with_gradient(function: Callable, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    inputs = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out, state = function(**inputs, impl="chunks", chunk=16)
    (out.square().sum() + state.square().sum()).backward()
    return out, state, *(x.grad for x in inputs.values())
