"""RWKV's time mixing against the papers' formulas, token by token, and the tuning of states."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from statistics import mean
from typing import Any

import pytest
import torch
from tests.support.formulas import follows
from tests.support.linear_text import DIM, HEADS, LENGTH, decoded, make, standard, tokens
from torch import Tensor
from torch.nn.functional import normalize, silu
from torch.testing import assert_close

from foveate.layers.token_shift import previous
from foveate.mixers.base import join_heads, split_heads
from foveate.mixers.recurrent_ssm.rwkv4 import RWKV4, weighed_average
from foveate.mixers.recurrent_ssm.rwkv6 import RWKV6
from foveate.mixers.recurrent_ssm.rwkv7 import RWKV7
from foveate.mixers.recurrent_ssm.state_tuning import StateTuning, adapt, kernel
from foveate.options import forced_impl
from foveate.recurrence import recur


def before(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


# ---- RWKV-4 -----------------------------------------------------------------------------------------------------


def wkv_formula(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
    """The quotient of sums over all pairs, as the paper writes it; overflows for large keys."""
    length = k.shape[1]
    distance = (torch.arange(length)[:, None] - torch.arange(length) - 1).double()
    exponent = distance[..., None] * decay + k.unsqueeze(1)  # (B, N, N, C)
    exponent = torch.where((distance >= 0)[..., None], exponent, -torch.inf)
    own = torch.diag_embed((k + bonus).transpose(1, 2)).permute(0, 2, 3, 1)
    exponent = torch.where(torch.eye(length, dtype=torch.bool)[..., None], own, exponent)
    weights = exponent.exp()
    return (weights * v.unsqueeze(1)).sum(2) / weights.sum(2)


def rwkv4_formula(mixer: Any, x: Tensor) -> Tensor:
    layers = (mixer.to_r, mixer.to_k, mixer.to_v)
    r, k, v = (layer(mu * x + (1 - mu) * before(x)) for layer, mu in zip(layers, mixer.shares, strict=True))
    wkv = wkv_formula(k, v, -mixer.A_log.exp(), mixer.bonus)
    return mixer.to_out(torch.sigmoid(r) * wkv)


def test_rwkv4_is_its_formula() -> None:
    mixer, x = make(RWKV4), tokens()
    assert_close(mixer(x), rwkv4_formula(mixer, x))


def test_weighed_averages_have_the_gradients_of_their_formula() -> None:
    k, v, decay = tokens().requires_grad_(), tokens().requires_grad_(), (-torch.rand(DIM).double()).requires_grad_()
    bonus, towards = torch.randn(DIM, dtype=torch.float64, requires_grad=True), tokens()
    wanted = torch.autograd.grad((wkv_formula(k, v, decay, bonus) * towards).sum(), (k, v, decay, bonus))
    found = torch.autograd.grad((weighed_average(k, v, decay, bonus)[0] * towards).sum(), (k, v, decay, bonus))
    for mine, theirs in zip(found, wanted, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("shift", [-2000.0, 2000.0])
def test_weighed_averages_depend_on_differences_of_keys_alone(shift: float) -> None:
    k, v, decay, bonus = tokens(), tokens(), -torch.rand(DIM).double(), torch.randn(DIM).double()
    assert_close(weighed_average(k + shift, v, decay, bonus)[0], wkv_formula(k, v, decay, bonus))


def test_weighed_averages_of_wild_keys_stay_among_the_values() -> None:
    k, v = 1e4 * torch.randn(2, 70, 5), torch.randn(2, 70, 5)
    out, _ = weighed_average(k, v, -torch.rand(5), torch.randn(5))
    assert out.isfinite().all()
    assert out.abs().max() <= v.abs().max() * (1 + 1e-5)


# ---- RWKV-6 -----------------------------------------------------------------------------------------------------


def normed(mixer: Any, heads: Tensor) -> Tensor:
    return join_heads(standard(heads, 1e-5 * mixer.head_dim)) * mixer.gain + mixer.offset


def rwkv6_formula(mixer: Any, x: Tensor) -> Tensor:
    move = before(x) - x
    inner = torch.tanh(mixer.to_ranks(x + move * mixer.share)).chunk(5, -1)
    shares = [each + rank @ up for each, rank, up in zip(mixer.shares, inner, mixer.to_shares, strict=True)]
    for_r, for_k, for_v, for_decay, for_gate = (x + move * share for share in shares)
    lora = mixer.to_decay
    decay = torch.exp(-torch.exp(torch.tanh(for_decay @ lora.down.weight.T) @ lora.up.weight.T + lora.bias))
    r, k, v = mixer.to_r(for_r), mixer.to_k(for_k), mixer.to_v(for_v)
    r, k, v, decay = (split_heads(y, HEADS).unsqueeze(-1) for y in (r, k, v, decay))  # (B, H, N, D, 1)
    state, outs = torch.zeros(x.shape[0], HEADS, 6, 6, dtype=torch.float64), []
    for t in range(x.shape[1]):
        written = k[:, :, t] @ v[:, :, t].mT
        outs.append(r[:, :, t].mT @ (state + mixer.bonus.unsqueeze(-1) * written))
        state = decay[:, :, t] * state + written
    return mixer.to_out(normed(mixer, torch.cat(outs, 2)) * silu(mixer.to_gate(for_gate)))


def test_rwkv6_is_its_formula() -> None:
    mixer, x = make(RWKV6, heads=HEADS, rank=3, decay_rank=5), tokens()
    assert_close(mixer(x), rwkv6_formula(mixer, x))


# ---- RWKV-7 -----------------------------------------------------------------------------------------------------


def rwkv7_parts(mixer: Any, x: Tensor) -> list[Tensor]:
    """Receptance, key, value, decay, unit removal key and its rate, (B, H, N, D, 1) each."""
    move = before(x) - x
    for_r, for_k, for_v, for_decay, for_rate, _ = (x + move * share for share in mixer.shares)
    rate = torch.sigmoid(mixer.to_rate(for_rate))
    decay = torch.exp(-(torch.exp(torch.tensor(-0.5))) * torch.sigmoid(mixer.to_decay(for_decay)))
    r, k, v = mixer.to_r(for_r), mixer.to_k(for_k), mixer.to_v(for_v)
    removal, key = k * mixer.removal, k * (1 + (rate - 1) * mixer.retained)
    parts = [split_heads(y, HEADS).unsqueeze(-1) for y in (r, key, v, decay, removal, rate)]
    parts[4] = parts[4] / parts[4].norm(dim=3, keepdim=True)
    return parts


def rwkv7_formula(mixer: Any, x: Tensor, state: Tensor | None = None) -> Tensor:
    r, key, v, decay, removal, rate = rwkv7_parts(mixer, x)
    state = torch.zeros(x.shape[0], HEADS, 6, 6, dtype=torch.float64) if state is None else state
    outs, stressed = [], []
    for t in range(x.shape[1]):
        turn = torch.diag_embed(decay[:, :, t].squeeze(-1)) - (rate * removal)[:, :, t] @ removal[:, :, t].mT
        state = turn @ state + key[:, :, t] @ v[:, :, t].mT
        outs.append(r[:, :, t].mT @ state)
        stressed.append((r[:, :, t] * mixer.bonus.unsqueeze(-1)).mT @ key[:, :, t] * v[:, :, t].mT)
    out = normed(mixer, torch.cat(outs, 2)) + join_heads(torch.cat(stressed, 2))
    return mixer.to_out(out * mixer.to_gate(x + (before(x) - x) * mixer.shares[-1]))


def test_rwkv7_is_its_formula() -> None:
    mixer, x = make(RWKV7, heads=HEADS, rank=3), tokens()
    assert_close(mixer(x), rwkv7_formula(mixer, x))


def test_rwkv7_keeps_its_state_bounded() -> None:
    mixer, x = RWKV7(DIM, HEADS), 3 * torch.randn(1, 3000, DIM)
    with torch.no_grad():
        _, state = mixer.prefill(x, mixer.init_state(1))
    assert state.matrix.isfinite().all() and state.matrix.abs().max() < 1e4


# ---- states that are learned -------------------------------------------------------------------------------------


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


# ---- token shift --------------------------------------------------------------------------------------------------


def test_token_shift_stays_inside_documents() -> None:
    x, lengths = tokens(10, batch=1), [3, 0, 1, 6]
    expected = torch.cat([before(piece) for piece in x.split(lengths, 1)], 1)
    assert_close(previous(x, tokens(1, batch=1)[:, 0], lengths), expected)
    assert previous(x[:, :0], x[:, 0]).shape == (1, 0, DIM)


@pytest.mark.parametrize("kind", [RWKV4, RWKV6, RWKV7])
def test_sequences_in_pieces_are_the_whole(kind: Any) -> None:
    mixer, x = make(kind), tokens()
    state, outs = mixer.init_state(2), []
    for piece in x.split([1, 0, 20, LENGTH - 21], dim=1):
        out, state = mixer.prefill(piece, state)
        outs.append(out)
    assert_close(torch.cat(outs, 1), mixer(x))
