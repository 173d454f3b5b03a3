"""Gradients of `recur` with respect to every tensor it takes."""

from __future__ import annotations

import pytest
import torch
from tests.support.recur_inputs import DECAYS, UPDATES, Inputs, fresh_generator, make_inputs, recur
from torch import Tensor
from torch.testing import assert_close

every_decay = pytest.mark.parametrize("decay", DECAYS)
every_update = pytest.mark.parametrize("update", UPDATES)


@every_decay
@every_update
@pytest.mark.parametrize("impl", ["reference", "chunks"])
def test_agree_with_finite_differences(decay: str, update: str, impl: str) -> None:
    inputs = make_inputs(decay, update, batch=1, heads=(4, 2, 1, 2), length=7, dims=(2, 3))
    if update == "delta":
        inputs["beta"] = 0.1 + 0.8 * inputs["beta"]  # finite differences may not leave [0, 2]
    if decay != "none":
        inputs["decay"] = inputs["decay"] - 0.1
    names, values = zip(*inputs.items(), strict=True)

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(recur(**dict(zip(names, tensors, strict=True)), impl=impl, chunk=4))

    # along random directions: a wrong Jacobian is off there, too
    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in values], fast_mode=True)


@every_decay
@every_update
@pytest.mark.parametrize("chunk", [16, 64])
def test_of_chunks_equal_the_references(decay: str, update: str, chunk: int) -> None:
    for length in (1, 5, 63, 64, 65, 130):
        inputs = make_inputs(decay, update, heads=(4, 2, 2, 2), length=length)
        generator = fresh_generator()
        actual = gradients(inputs, generator.clone_state(), impl="chunks", chunk=chunk)
        expected = gradients(inputs, generator.clone_state(), impl="reference")
        assert_close(actual, expected, rtol=1e-8, atol=1e-9)


@every_update
def test_of_packed_sequences_equal_the_references(update: str) -> None:
    inputs = make_inputs("channel", update, batch=1, length=40)
    inputs["state"] = inputs["state"].expand(3, -1, -1, -1)
    generator = fresh_generator()
    actual, expected = (
        gradients(inputs, generator.clone_state(), impl=impl, lengths=(23, 0, 17)) for impl in ("chunks", "reference")
    )
    assert_close(actual, expected)


def test_without_causality_equal_the_references() -> None:
    inputs = make_inputs(heads=(4, 2, 1, 1), length=37)
    generator = fresh_generator()
    actual, expected = (
        gradients(inputs, generator.clone_state(), impl=impl, causal=False) for impl in ("chunks", "reference")
    )
    assert_close(actual, expected)


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
@every_update
def test_stay_finite_under_resets_and_strong_decay(decay: str, update: str) -> None:
    inputs = make_inputs(decay, update, length=65, strength=100.0, dtype=torch.float32)
    inputs["decay"].view(-1)[::2] = -torch.inf
    for gradient in gradients(inputs, fresh_generator(), impl="chunks").values():
        assert gradient.isfinite().all()


def gradients(inputs: Inputs, generator: torch.Generator, **options) -> dict[str, Tensor]:
    """Of a random weighting of out and state."""
    inputs = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    result = recur(**inputs, **options)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in result]
    loss = sum((w * x).sum() for w, x in zip(weights, result, strict=True))
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))
