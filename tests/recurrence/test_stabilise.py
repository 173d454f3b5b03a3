"""Units of exponentially gated states: the state is what the formula says, and nothing in it exceeds 1."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.recurrence.linear.stabilise import Stabilised, stabilise


def gates(length: int = 41, size: float = 3.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    decay = -size * torch.rand(2, 3, length, dtype=torch.float64)
    gate = size * torch.randn(2, 3, length, dtype=torch.float64)
    return decay.to(dtype), gate.to(dtype), torch.randn(2, 3, length, dtype=torch.float64).to(dtype)


def naive(decay: Tensor, gate: Tensor, inputs: Tensor) -> Tensor:
    """S_t for all t, by the formula."""
    state, states = torch.zeros_like(decay[..., 0]), []
    for t in range(decay.shape[-1]):
        state = decay[..., t].exp() * state + gate[..., t].exp() * inputs[..., t]
        states.append(state)
    return torch.stack(states, -1)


def scaled(stable: Stabilised, inputs: Tensor, state: Tensor | None = None) -> Tensor:
    state, states = torch.zeros_like(inputs[..., 0]) if state is None else state, []
    for t in range(inputs.shape[-1]):
        state = stable.decay[..., t].exp() * state + stable.weight[..., t] * inputs[..., t]
        states.append(state)
    return torch.stack(states, -1)


def test_the_scaled_state_is_the_state() -> None:
    decay, gate, inputs = gates()
    stable = stabilise(decay, gate)
    assert_close(scaled(stable, inputs) * stable.after.exp(), naive(decay, gate, inputs))


def test_units_are_those_of_the_paper() -> None:
    decay, gate, _ = gates()
    stable = stabilise(decay, gate)
    unit = torch.full((2, 3), -torch.inf, dtype=torch.float64)
    for t in range(gate.shape[-1]):
        unit = torch.maximum(decay[..., t] + unit, gate[..., t])
        assert_close(stable.after[..., t], unit)


def test_gradients_are_those_of_the_formula() -> None:
    decay, gate, inputs = (x.requires_grad_() for x in gates())
    towards = torch.randn(2, 3, 41, dtype=torch.float64)
    wanted = torch.autograd.grad((naive(decay, gate, inputs) * towards).sum(), (decay, gate, inputs))
    stable = stabilise(decay, gate)
    found = torch.autograd.grad((scaled(stable, inputs) * stable.after.exp() * towards).sum(), (decay, gate, inputs))
    for mine, theirs in zip(found, wanted, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("size", [3.0, 300.0, 1e5, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_overflows(size: float, dtype: torch.dtype) -> None:
    decay, gate, inputs = gates(size=size, dtype=dtype)
    stable = stabilise(decay, gate)
    assert (stable.decay <= 0).all()
    assert (stable.weight <= 1.001).all() and (stable.weight >= 0).all()
    assert scaled(stable, inputs).isfinite().all()
    assert (stable.weight.amax(-1) >= 0.999).all()  # and the greatest gate of all is not lost


def test_ratios_of_states_survive_where_the_states_do_not() -> None:
    decay, gate, inputs = gates()
    ratio = naive(decay, gate, inputs) / naive(decay, gate, torch.ones_like(inputs))
    for shift in (2000.0, -2000.0):  # exp(2000) is infinite, exp(-2000) is zero
        stable = stabilise(decay, gate + shift)
        assert_close(scaled(stable, inputs) / scaled(stable, torch.ones_like(inputs)), ratio)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pieces_with_the_unit_handed_over_are_the_whole(dtype: torch.dtype) -> None:
    decay, gate, inputs = gates(dtype=dtype)
    stable = stabilise(decay, gate + 500)
    whole = scaled(stable, inputs) / scaled(stable, torch.ones_like(inputs))
    unit, state, ones, ratios = None, None, None, []
    for piece in (slice(0, 1), slice(1, 1), slice(1, 20), slice(20, 41)):
        part = stabilise(decay[..., piece], gate[..., piece] + 500, unit=unit)
        if part.decay.shape[-1]:
            states, weights = (
                scaled(part, inputs[..., piece], state),
                scaled(part, torch.ones_like(inputs[..., piece]), ones),
            )
            state, ones = states[..., -1], weights[..., -1]
            ratios.append(states / weights)
        unit = part.last
    slack = 1e3 * torch.finfo(dtype).eps  # units near 500 round, and averages of either sign may cancel
    assert_close(torch.cat(ratios, -1), whole, rtol=slack, atol=slack)
    assert_close(unit, stable.last)


def test_packed_sequences_start_anew() -> None:
    decay, gate, _ = gates()
    gate[..., :10] += 1e4  # the units of the first document would leave nothing of the others
    lengths = [10, 0, 1, 30]
    packed = stabilise(decay[:1], gate[:1], lengths=lengths)
    pieces = zip(decay[:1].split(lengths, -1), gate[:1].split(lengths, -1), strict=True)
    alone = [stabilise(*piece) for piece in pieces]
    for name in ("decay", "weight", "before", "after"):
        assert_close(getattr(packed, name), torch.cat([getattr(each, name) for each in alone], -1))
    assert_close(packed.last, torch.cat([each.last for each in alone]))


def test_the_time_axis_may_lie_anywhere() -> None:
    decay, gate, _ = gates()
    plain, turned = stabilise(decay, gate), stabilise(decay.mT, gate.mT, dim=1)
    assert_close(turned.after.mT, plain.after)
    assert_close(turned.decay.mT, plain.decay)


def test_gates_of_minus_infinity_write_nothing() -> None:
    decay, gate, inputs = gates()
    gate[..., :5] = gate[..., 20] = -math.inf
    stable = stabilise(decay, gate)
    assert (stable.weight[..., :5] == 0).all() and (stable.weight[..., 20] == 0).all()
    assert_close(scaled(stable, inputs) * stable.after.exp(), naive(decay, gate, inputs))


def test_a_million_tokens_keep_their_digits() -> None:
    decay = torch.full((1_000_000,), -0.01, dtype=torch.float64)
    gate = torch.randn(1_000_000, dtype=torch.float64)
    stable = stabilise(decay, gate)
    tail = stabilise(decay[-5000:], gate[-5000:])
    assert_close(stable.after[-1000:], tail.after[-1000:], rtol=0, atol=1e-9)


def test_refusals() -> None:
    decay, gate, _ = gates()
    with pytest.raises(ValueError, match="one shape"):
        stabilise(decay[..., 1:], gate)
    with pytest.raises(ValueError, match="lengths or unit"):
        stabilise(decay, gate, lengths=[41], unit=gate[..., 0])
