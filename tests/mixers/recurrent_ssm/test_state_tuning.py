"""The tuning of a recurrent model's initial state, and of a state enlarged by kernel features."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from statistics import mean
from typing import Any

import pytest
import torch
from tests.support.formulas import follows
from tests.support.linear_text import DIM, HEADS, decoded, make, tokens
from tests.support.rwkv_formulas import before, normed, rwkv7_formula, rwkv7_parts
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from foveate.mixers.base import join_heads
from foveate.mixers.recurrent_ssm.rwkv7 import RWKV7
from foveate.mixers.recurrent_ssm.state_tuning import StateTuning, adapt, kernel
from foveate.options import forced_impl
from foveate.recurrence import recur


@pytest.mark.paper("State-Tuning", "works_when")
@pytest.mark.parametrize("impl", ["chunks", "reference"])
def test_gradients_reach_the_initial_state(impl: str) -> None:
    mixer, x = make(RWKV7, heads=HEADS, rank=3, initial=True), tokens(11)
    assert_close(mixer(x), rwkv7_formula(mixer, x, mixer.initial.expand(2, -1, -1, -1)))
    towards = torch.randn_like(x)

    def loss(state: Tensor) -> Tensor:
        mixer.initial.data.copy_(state)
        with forced_impl(impl):
            return (mixer(x) * towards).sum()

    start = mixer.initial.detach().clone()
    (gradient,) = torch.autograd.grad(loss(start), mixer.initial)
    way, move = torch.randn_like(start), 1e-6
    with torch.no_grad():
        seen = (loss(start + move * way) - loss(start - move * way)) / (2 * move)
    assert_close((gradient * way).sum(), seen, rtol=1e-5, atol=1e-6)


def test_recur_differentiates_its_state_in_every_form() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 3, dtype=torch.float64)
    removal, rate = normalize(torch.randn_like(k), dim=-1), torch.rand_like(k)
    options: dict[str, Any] = {"decay": -torch.rand_like(k), "low_rank": (-removal, removal * rate)}
    state = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def form(impl: str) -> Callable[[Tensor], Tensor]:
        return lambda state: recur(q, k, v, **options, state=state, impl=impl).out

    for impl in ("chunks", "reference"):
        assert torch.autograd.gradcheck(form(impl), state)


@pytest.mark.parametrize("features", [None, 10])
def test_tuning_the_state_alone_finds_what_another_state_says(features: int | None) -> None:
    """Of a teacher who differs in its first state alone, on tokens never seen before."""
    trained = RWKV7(DIM, HEADS, rank=3)
    tuned, x = adapt(trained, features=features), torch.randn(4, 5, DIM)
    assert [name for name, p in tuned.named_parameters() if p.requires_grad] == ["initial"]
    if features is None:
        assert_close(tuned(x), trained(x))
    teacher, kept = deepcopy(tuned), {name: p.clone() for name, p in tuned.named_parameters()}
    teacher.initial.data = torch.randn_like(teacher.initial)

    def error() -> Tensor:
        x = torch.randn(8, 4, DIM)
        return (tuned(x) - teacher(x).detach()).square().mean()

    before, optimizer = mean(error().item() for _ in range(5)), torch.optim.Adam([tuned.initial], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert mean(error().item() for _ in range(5)) < 0.15 * before
    for name, parameter in tuned.named_parameters():
        assert name == "initial" or bool((parameter == kept[name]).all())


@pytest.mark.paper("State-Tuning", "works_when")
def test_an_enlarged_state_decodes_as_it_reads() -> None:
    mixer, x = make(StateTuning, heads=HEADS, rank=3, features=10), tokens()
    state = mixer.init_state(2)
    assert state.matrix.shape == (2, HEADS, 10, 10)
    assert_close(decoded(mixer, x, state)[0], mixer(x))


@pytest.mark.paper("State-Tuning", "works_when")
def test_an_enlarged_state_is_the_recurrence_of_kernel_features() -> None:
    mixer = StateTuning(DIM, HEADS, rank=3, features=10, sharpness=0.3).double()
    x = tokens(9).requires_grad_()

    def formula() -> Tensor:
        r, k, v, decay, removal, rate = (part.squeeze(-1) for part in rwkv7_parts(mixer, x))
        stress = (r * k * mixer.bonus.unsqueeze(1)).sum(-1, keepdim=True) * v

        def phi(y: Tensor) -> Tensor:
            return torch.exp(-0.3 * (y.unsqueeze(-2) - mixer.supports[:, None]).square().sum(-1))

        removed = normalize(phi(removal), dim=-1).unsqueeze(-1)
        r, k, v, faded, rate = (phi(y).unsqueeze(-1) for y in (r, k, v, decay, rate))
        state, outs = mixer.initial.expand(2, -1, -1, -1), []
        for t in range(9):
            turn = torch.diag_embed(faded[:, :, t].squeeze(-1)) - (rate * removed)[:, :, t] @ removed[:, :, t].mT
            state = turn @ state + k[:, :, t] @ v[:, :, t].mT
            outs.append(r[:, :, t].mT @ state)
        gram = torch.exp(-0.3 * torch.cdist(mixer.supports, mixer.supports).square())
        back = torch.linalg.pinv(gram) @ mixer.supports
        heads = normed(mixer, torch.cat(outs, 2) @ back) + join_heads(stress)
        return mixer.to_out(heads * mixer.to_gate(x + (before(x) - x) * mixer.shares[-1]))

    follows(mixer, lambda: mixer(x), formula, x, rtol=1e-6)


def test_support_vectors_become_themselves_again() -> None:
    mixer = StateTuning(DIM, HEADS, features=10).double()
    vectors = torch.randn(HEADS, 10, 6, dtype=torch.float64)
    mixer.support(vectors)
    assert_close(kernel(vectors, vectors, mixer.sharpness) @ mixer.back, vectors)
    with pytest.raises(ValueError, match="support vectors are"):
        mixer.support(vectors[:, 1:])
    for wrong, word in (({"features": 0}, "features"), ({"sharpness": 0.0}, "sharpness")):
        with pytest.raises(ValueError, match=word):
            StateTuning(DIM, HEADS, **wrong)
