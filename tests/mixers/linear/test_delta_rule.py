"""The delta rule's rows against their formulas: loops over tokens, products of matrices, a matrix exponential."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.formulas import agree
from torch import Tensor
from torch.nn.functional import silu, softplus
from torch.testing import assert_close

from foveate.mixers.base import join_heads, split_heads
from foveate.mixers.linear.delta_product import DeltaProduct
from foveate.mixers.linear.deltanet import DeltaNet
from foveate.mixers.linear.efla import EFLA, exact_strength
from foveate.mixers.linear.kda import KDA
from foveate.mixers.recurrent import RecurrentMixer
from foveate.options import forced_impl
from foveate.recurrence import recur
from foveate.testing import reference_only

DIM, HEADS, LENGTH = 24, 4, 37


def make(kind: type[RecurrentMixer], *, moved: bool = True, **options: Any) -> Any:
    mixer = kind(DIM, HEADS, **options).double()
    for parameter in mixer.parameters() if moved else ():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return mixer


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, DIM, dtype=torch.float64)


def convolved(mixer: Any, x: Tensor) -> list[Tensor]:
    """Projected queries, keys and values (B, H, N, ...) after their convolutions, written as sums of shifts."""
    heads = []
    for conv, layer in zip(mixer.convs, (mixer.to_q, mixer.to_k, mixer.to_v), strict=True):
        flat, taps = layer(x), conv.weight.squeeze(1)  # the last tap reads the token itself
        shifted = [torch.cat([torch.zeros_like(flat[:, :age]), flat[:, : flat.shape[1] - age]], 1) for age in range(4)]
        heads.append(split_heads(silu(sum(taps[:, 3 - age] * shifted[age] for age in range(4))), HEADS))
    return heads


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def overwritten(state: Tensor, k: Tensor, v: Tensor, strength: Tensor) -> Tensor:
    """(I - beta k k^T) S + beta k v^T for k (B, H, D), v (B, H, Dv), beta (B, H)."""
    k, strength = k.unsqueeze(-1), strength[..., None, None]
    return state - strength * k @ (k.mT @ state) + strength * k @ v.unsqueeze(-2)


def said(mixer: Any, q: Tensor, state: Tensor) -> Tensor:
    return mixer.head_dim**-0.5 * (q.unsqueeze(-2) @ state)


@pytest.mark.paper("DeltaNet", "definition")
@pytest.mark.parametrize("negative", [False, True])
def test_deltanet_overwrites_what_its_keys_recall(negative: bool) -> None:
    mixer, x = make(DeltaNet, negative=negative), tokens()
    q, k, v = convolved(mixer, x)
    q, k = unit(q), unit(k)
    beta = (2 if negative else 1) * torch.sigmoid(mixer.to_strength(x)).transpose(1, 2)
    state, outs = torch.zeros(2, HEADS, 6, 6, dtype=torch.float64), []
    for t in range(LENGTH):
        state = overwritten(state, k[:, :, t], v[:, :, t], beta[:, :, t])
        outs.append(said(mixer, q[:, :, t], state))
    assert_close(mixer(x), mixer.to_out(join_heads(rms(torch.cat(outs, 2), mixer.norm.weight))))


@pytest.mark.parametrize("negative", [False, True])
def test_the_strongest_step_reflects_or_overwrites(negative: bool) -> None:
    """At full strength what the key recalls is replaced by the value; with negative=True it turns its sign, too."""
    mixer, x = make(DeltaNet, negative=negative), tokens(1)
    mixer.to_strength.weight.data.copy_(1e3 * x[0].expand_as(mixer.to_strength.weight))
    start, before = mixer.init_state(2), torch.randn(2, HEADS, 6, 6, dtype=torch.float64)
    _, after = mixer.prefill(x, start._replace(recurrent=before))
    _, k, v = convolved(mixer, x)
    key = unit(k)[0, :, 0].unsqueeze(-2)
    recalled, wanted = key @ after.recurrent[0], v[0, :, 0].unsqueeze(-2)
    assert_close(recalled, 2 * wanted - key @ before[0] if negative else wanted)


def test_chunks_tokens_and_definition_agree_on_outputs_state_and_gradients() -> None:
    mixer, x = make(DeltaNet, negative=True), tokens(70).requires_grad_()
    q, k, v, _ = mixer.project(x, x, ())
    inputs, start = vars(mixer.inputs(x, q, k, v)), torch.randn(2, HEADS, 6, 6, dtype=torch.float64)
    found = []
    for impl in ("chunks", "reference"):
        out, state = recur(**inputs, state=start, impl=impl)
        (gradient,) = torch.autograd.grad(out.square().sum() + state.sin().sum(), x, retain_graph=True)
        found.append((out, state, gradient))
    for chunked, by_token in zip(*found, strict=True):
        assert_close(chunked, by_token)


def matrix_exponential_state(state: Tensor, k: Tensor, v: Tensor, time: Tensor) -> Tensor:
    """S(time) of dS/dt = -k k^T S + k v^T, S(0) = state, as the exponential of one matrix."""
    size = state.shape[0]
    system = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    system[:size, :size], system[:size, size] = -torch.outer(k, k), k
    grown = torch.linalg.matrix_exp(time * system)  # d/dt (s, 1) = system (s, 1), for a value of 1
    return grown[:size, :size] @ state + torch.outer(grown[:size, size], v)


@pytest.mark.paper("EFLA", "works_when")
@pytest.mark.parametrize("size", [1e-4, 1.0, 4.0])
def test_efla_solves_the_differential_equation(size: float) -> None:
    k, v = size * torch.randn(1, 1, 11, 5, dtype=torch.float64), torch.randn(1, 1, 11, 3, dtype=torch.float64)
    q, beta = torch.randn(1, 1, 11, 5, dtype=torch.float64), torch.rand(1, 1, 11, dtype=torch.float64)
    state, outs = torch.zeros(5, 3, dtype=torch.float64), []
    for t in range(11):
        state = matrix_exponential_state(state, k[0, 0, t], v[0, 0, t], beta[0, 0, t])
        outs.append(q[0, 0, t] @ state)
    for impl in ("chunks", "reference", "auto"):
        found = recur(q, k, v, beta=exact_strength(beta, k), scale=1.0, impl=impl)
        assert_close(found.out[0, 0], torch.stack(outs))
        assert_close(found.state[0, 0], state)


@pytest.mark.paper("EFLA", "works_when")
def test_gradients_of_efla_are_those_of_the_differential_equation() -> None:
    k, v = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)
    beta, before = torch.rand((), dtype=torch.float64, requires_grad=True), torch.randn(5, 3, dtype=torch.float64)
    towards = torch.randn(5, 3, dtype=torch.float64)
    wanted = torch.autograd.grad((matrix_exponential_state(before, k, v, beta) * towards).sum(), (k, beta))
    key, value = k.view(1, 1, 1, 5), v.view(1, 1, 1, 3)
    state = recur(key, key, value, beta=exact_strength(beta.view(1, 1, 1), key), state=before[None, None]).state
    for mine, theirs in zip(torch.autograd.grad((state[0, 0] * towards).sum(), (k, beta)), wanted, strict=True):
        assert_close(mine, theirs)


@pytest.mark.paper("EFLA", "definition")
@pytest.mark.paper("EFLA", "works_when")
@pytest.mark.parametrize("impl", ["chunks", "reference", None])
@pytest.mark.parametrize("moved", [True, False])
def test_efla_is_the_delta_rule_with_exact_strengths(moved: bool, impl: str | None) -> None:
    mixer, x = make(EFLA, moved=moved), tokens().requires_grad_()
    q, k, v = convolved(mixer, x)
    q = unit(q)
    beta, length = torch.sigmoid(mixer.to_strength(x)).transpose(1, 2), k.square().sum(-1)
    strength = (1 - torch.exp(-beta * length)) / length
    state, outs = torch.zeros(2, HEADS, 6, 6, dtype=torch.float64), []
    for t in range(LENGTH):
        state = overwritten(state, k[:, :, t], v[:, :, t], strength[:, :, t])
        outs.append(said(mixer, q[:, :, t], state))
    with forced_impl(impl):
        found = mixer(x)
        agree(found, mixer.to_out(join_heads(rms(torch.cat(outs, 2), mixer.norm.weight))), x, mixer)


@pytest.mark.paper("EFLA", "works_when")
def test_one_step_of_efla_moves_its_state_as_the_differential_equation_does() -> None:
    mixer, x = make(EFLA), tokens(1)
    start, before = mixer.init_state(2), torch.randn(2, HEADS, 6, 6, dtype=torch.float64)
    _, after = mixer.decode(x, start._replace(recurrent=before))
    _, k, v = convolved(mixer, x)
    beta = torch.sigmoid(mixer.to_strength(x))
    for b in range(2):
        for h in range(HEADS):
            moved = matrix_exponential_state(before[b, h], k[b, h, 0], v[b, h, 0], beta[b, 0, h])
            assert_close(after.recurrent[b, h], moved)


@pytest.mark.paper("EFLA", "works_when")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_strengths_tend_to_the_delta_rules_for_short_keys(dtype: torch.dtype) -> None:
    beta = torch.rand(9, dtype=dtype).requires_grad_()
    for size in (0.0, 1e-30, 1e-12, 1e-6):
        k = torch.full((9, 3), size, dtype=dtype, requires_grad=True)
        strength = exact_strength(beta, k)
        assert_close(strength, beta, rtol=1e-6, atol=0)
        of_beta, of_k = torch.autograd.grad(strength.sum(), (beta, k))
        assert_close(of_beta, torch.ones_like(beta), rtol=1e-6, atol=0)
        assert of_k.isfinite().all() and of_k.abs().max() <= 2 * max(size, 1e-30)


def test_exact_strengths_keep_their_digits_where_the_series_ends() -> None:
    for time in (0.0099, 0.0101):
        k = torch.tensor([[time**0.5]], dtype=torch.float64, requires_grad=True)
        beta = torch.ones(1, dtype=torch.float64)
        assert_close(exact_strength(beta, k), -torch.expm1(-k.square()[0]) / k.square()[0], rtol=1e-13, atol=0)
        assert torch.autograd.gradcheck(lambda k, beta=beta: exact_strength(beta, k), k)


def test_exact_strengths_never_diverge() -> None:
    k, beta = 1e3 * torch.randn(50, 4), torch.rand(50)
    moved = exact_strength(beta, k) * k.square().sum(-1)
    assert (moved <= 1 + 1e-6).all() and (moved >= 0).all()


def test_kda_fades_each_channel_and_then_overwrites() -> None:
    mixer, x = make(KDA, rank=5), tokens()
    q, k, v = convolved(mixer, x)
    q, k = unit(q), unit(k)
    beta = torch.sigmoid(mixer.to_strength(x)).transpose(1, 2)
    pace = split_heads(softplus(mixer.to_decay(x)), HEADS) * mixer.A_log.exp().view(HEADS, 1, 1)
    state, outs = torch.zeros(2, HEADS, 6, 6, dtype=torch.float64), []
    for t in range(LENGTH):
        faded = torch.exp(-pace[:, :, t]).unsqueeze(-1) * state
        state = overwritten(faded, k[:, :, t], v[:, :, t], beta[:, :, t])
        outs.append(said(mixer, q[:, :, t], state))
    normed = join_heads(rms(torch.cat(outs, 2), mixer.norm.weight))
    assert_close(mixer(x), mixer.to_out(normed * torch.sigmoid(mixer.to_gate(x))))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_delta_product_takes_several_steps_a_token(steps: int, gated: bool) -> None:
    mixer, x = make(DeltaProduct, steps=steps, gated=gated), tokens()
    q, k, v = convolved(mixer, x)
    q, k, v = unit(q), unit(k.unflatten(-1, (steps, -1))), v.unflatten(-1, (steps, -1))  # k, v (B, H, N, steps, D)
    beta = 2 * torch.sigmoid(mixer.to_strength(x)).unflatten(-1, (HEADS, steps)).permute(0, 2, 1, 3)
    state, outs = torch.zeros(2, HEADS, 6, 6, dtype=torch.float64), []
    for t in range(LENGTH):
        if gated:
            pace = softplus(mixer.to_decay(x[:, t])) * mixer.A_log.exp()
            state = torch.exp(-pace)[..., None, None] * state
        for step in range(steps):
            state = overwritten(state, k[:, :, t, step], v[:, :, t, step], beta[:, :, t, step])
        outs.append(said(mixer, q[:, :, t], state))
    assert_close(mixer(x), mixer.to_out(join_heads(rms(torch.cat(outs, 2), mixer.norm.weight))))


def test_two_reflections_rotate() -> None:
    angle = torch.tensor(0.7, dtype=torch.float64)
    axes = torch.stack([torch.stack([(a).cos(), (a).sin()]) for a in (angle * 0, angle / 2)])
    k, v = axes.view(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    start = torch.eye(2, dtype=torch.float64).view(1, 1, 2, 2)
    state = recur(k, k, v, beta=torch.full((1, 1, 2), 2.0, dtype=torch.float64), state=start).state[0, 0]
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    assert_close(state, turn)


@pytest.mark.paper("EFLA", "works_when")
def test_an_earlier_state_goes_on() -> None:
    for mixer in (make(DeltaNet), make(EFLA), make(KDA), make(DeltaProduct, steps=3, gated=True)):
        x = tokens(70)
        with reference_only():
            whole = mixer(x)
        first, state = mixer.prefill(x[:, :33], mixer.init_state(2))
        assert_close(torch.cat([first, mixer.prefill(x[:, 33:], state).out], 1), whole)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least once"):
        make(DeltaProduct, steps=0)
    with pytest.raises(ValueError, match="noncausal"):
        make(DeltaNet, causal=False)
