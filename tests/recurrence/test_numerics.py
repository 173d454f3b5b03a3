"""What rounding does to `recur`: no more than to a plain loop, for decays of any strength."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from tests.support.native_checks import needs_native
from tests.support.recur_inputs import (
    DECAYS,
    UPDATES,
    Inputs,
    fresh_generator,
    make_inputs,
    plain_recur,
    recur,
    spread,
    summed,
)
from torch import Tensor
from torch.testing import assert_close

every_decay = pytest.mark.parametrize("decay", DECAYS)
every_update = pytest.mark.parametrize("update", UPDATES)
native = pytest.param("native", marks=needs_native)
every_impl = pytest.mark.parametrize("impl", ["reference", "chunks", native])


def to(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: x.to(dtype) for name, x in inputs.items()}


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@every_decay
@every_update
@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errs_at_most_twice_as_much_as_a_plain_loop(decay: str, update: str, impl: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(decay, update, heads=(4, 2, 2, 4), length=130, dims=(33, 16), dtype=dtype)
    exact, exact_state = plain_recur(**to(inputs, torch.float64))
    plain, plain_state = plain_recur(**inputs)
    actual, state = recur(**inputs, impl=impl)
    assert (actual.dtype, state.dtype) == (dtype, torch.float32)
    assert_errs_no_more(actual, plain, exact)
    assert_errs_no_more(state.repeat_interleave(4 // state.size(1), 1), plain_state, exact_state)


@every_decay
@every_update
@pytest.mark.parametrize("impl", ["chunks", native])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_err_at_most_twice_as_much_as_a_plain_loops(
    decay: str, update: str, impl: str, dtype: torch.dtype
) -> None:
    inputs = make_inputs(decay, update, length=70, dims=(33, 16), dtype=dtype)
    exact, apart = (gradients(plain_recur, to(x, torch.float64)) for x in (inputs, spread(inputs)))
    plain = gradients(plain_recur, inputs)
    actual = gradients(partial(recur, impl=impl), inputs)
    for name in inputs:
        assert actual[name].dtype == inputs[name].dtype
        luck = 8 if actual[name].dim() < 4 else 2  # over a few numbers, a plain loop may hit the exact ones
        size = rms(summed(exact[name], apart[name]))
        assert_errs_no_more(actual[name], plain[name], exact[name], luck * size)


def gradients(function: Callable, inputs: Inputs) -> Inputs:
    inputs = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out, _ = function(**inputs)
    out.double().square().sum().backward()
    return {name: x.grad for name, x in inputs.items() if x.grad is not None}


def assert_errs_no_more(actual: Tensor, plain: Tensor, exact: Tensor, size: float | None = None) -> None:
    """Than twice the plain loop, and a rounding of numbers of that size."""
    allowance = torch.finfo(plain.dtype).eps * (rms(exact) if size is None else size)
    assert rms(actual - exact) <= 2 * rms(plain - exact) + allowance


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
@every_update
@pytest.mark.parametrize("strength", [1e-6, 30.0, 1000.0])
def test_weak_and_strong_decay_keep_their_digits(decay: str, update: str, strength: float) -> None:
    inputs = make_inputs(decay, update, length=130, strength=strength, dtype=torch.float32)
    assert_keeps_its_digits(inputs)


@pytest.mark.parametrize("decay", ["token", "channel"])
@every_update
def test_decay_of_mixed_strength_keeps_its_digits(decay: str, update: str) -> None:
    """Factors near 1 between factors of exp(-1000): differences of cumulated logarithms would lose them."""
    inputs = make_inputs(decay, update, length=130, strength=0.01, dtype=torch.float32)
    strong = torch.rand(inputs["decay"].shape, generator=fresh_generator()) < 0.05
    inputs["decay"] = inputs["decay"].masked_fill(strong, -1000.0)
    assert_keeps_its_digits(inputs)


def assert_keeps_its_digits(inputs: Inputs) -> None:
    exact = recur(**to(inputs, torch.float64), impl="reference")
    actual = recur(**inputs, impl="chunks")
    for got, expected in zip(actual, exact, strict=True):
        assert_close(got.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("decay", ["token", "channel"])
@every_update
def test_stays_finite_over_20000_tokens(decay: str, update: str) -> None:
    inputs = make_inputs(decay, update, batch=1, length=20_000, strength=30.0, dtype=torch.float32)
    inputs["decay"] *= torch.rand(inputs["decay"].shape, generator=fresh_generator()) ** 8
    out, state = recur(**inputs)
    assert out.isfinite().all()
    assert state.isfinite().all()


def test_remembers_a_token_over_20000_others() -> None:
    inputs = make_inputs("head", batch=1, length=20_001, strength=1e-5, dtype=torch.float32)
    inputs["v"][:, :, 1:] = 0
    inputs["state"].zero_()
    first = inputs["k"][:, :, 0, :, None] * inputs["v"][:, :, 0, None, :]
    kept = (20_000 * inputs["decay"]).exp()[None, :, None, None]
    rounded = 20_000 * 2 * 6e-8  # a factor near 1 is off by half of 6e-8, and so is each state; they may all go one way
    assert_close(recur(**inputs).state, first * kept, rtol=rounded, atol=0)


@every_update
def test_autocast_leaves_the_arithmetic_in_float32(update: str) -> None:
    inputs = make_inputs("token", update, dtype=torch.float32)
    expected = recur(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = recur(**inputs)
    assert_close(actual, expected, rtol=0, atol=0)
