"""Mixers under derivatives of derivatives, vmap and fake tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from foveate.catalogue.registry import row, rows
from foveate.mixers.base import Mixer
from foveate.recurrence.ttt import ttt_linear
from foveate.testing import reference_only
from foveate.testing.case import Place, Subject

NAMES = [row.name for row in rows()]
ESTIMATED = {"yoso"}  # whose gradient is no derivative


def subject(name: str) -> tuple[Mixer, Tensor, Place]:
    found = row(name)
    made = Subject(found, getattr(found.mixer, "tiny", {}), causal="causal" in found.supports)
    place = made.places(11)[0]
    return made.mixer(torch.float32), made.tokens(place.length, 1).float(), place


def penalty(mixer: Mixer, x: Tensor, place: Place) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(mixer(x, layout=place.layout).square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


@pytest.mark.parametrize("name", NAMES)
def test_gradient_penalties_are_those_of_the_definition(name: str) -> None:
    mixer, x, place = subject(name)
    if name in ESTIMATED:
        with pytest.raises(RuntimeError, match="estimate"):
            penalty(mixer, x, place)
        return
    got = penalty(mixer, x, place)
    with reference_only():
        want = penalty(copy.deepcopy(mixer).double(), x.double(), place)
    assert float((got - want).norm()) <= 1e-2 * float(want.norm())


@pytest.mark.parametrize("name", ["moba", "vmamba", "restore_rwkv", "memory_efficient_attention", "h3", "rwkv7", "s5"])
def test_fake_tensors_go_through_and_leave_nothing_behind(name: str) -> None:
    mixer, x, place = subject(name)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert mixer(mode.from_tensor(x), layout=place.layout).shape == x.shape
    want = copy.deepcopy(mixer)(x, layout=place.layout)
    torch.testing.assert_close(mixer(x, layout=place.layout), want)


@pytest.mark.parametrize("name", ["moba", "mamba2", "gated_deltanet", "spikformer_v2", "neighborhood_attention"])
def test_vmap_over_a_mixer_equals_its_batch(name: str) -> None:
    mixer, x, place = subject(name)
    both = torch.cat([x, x.flip(1)])
    got = torch.vmap(lambda x: mixer(x[None], layout=place.layout)[0])(both)
    torch.testing.assert_close(got, mixer(both, layout=place.layout), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "dual"])
def test_second_derivatives_of_test_time_training(impl: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 3, 3, dtype=torch.float64).unbind()
    eta, weight = torch.rand(1, 2, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    norm = torch.rand(2, 2, 3, dtype=torch.float64).unbind()

    def run(q: Tensor, k: Tensor, v: Tensor, eta: Tensor, weight: Tensor) -> Tensor:
        return ttt_linear(q, k, v, eta, weight, norm, batch=2, impl=impl).out

    leaves = [x.requires_grad_() for x in (q, k, v, eta, weight)]
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True, atol=1e-4)
