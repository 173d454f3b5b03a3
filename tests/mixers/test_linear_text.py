"""Linear attention for text against its papers' formulas, written out token by token or pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.linear_text import (
    DIM,
    HEADS,
    LENGTH,
    ages,
    decoded,
    fading_sum,
    held,
    make,
    project,
    rms,
    shifted_sum,
    standard,
    tokens,
)
from torch import Tensor
from torch.nn.functional import silu, softplus
from torch.testing import assert_close

from foveate.mixers.base import join_heads, split_heads
from foveate.mixers.linear.decayed import LightningAttention, Retention, TransNormerLLM, places
from foveate.mixers.linear.linear import LightningAttention2
from foveate.mixers.linear.mlstm import MLSTM
from foveate.mixers.linear.shared_key import RodimusPlus, SharedKeyWindow
from foveate.mixers.linear.tied import HGRN2, MetaLA, Rodimus

# ---- gates tied to keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lower", [0.0, 0.6])
def test_hgrn2_takes_in_what_it_forgets(lower: float) -> None:
    mixer, x = make(HGRN2, heads=HEADS, lower=lower), tokens()
    q, logits, v = project(mixer, x)
    forget = lower + (1 - lower) * torch.sigmoid(logits)
    heads = fading_sum(silu(q), 1 - forget, v, forget)
    assert_close(mixer(x), mixer.to_out(rms(join_heads(heads)) * mixer.norm.weight))
    with pytest.raises(ValueError, match="lower"):
        make(HGRN2, lower=1.0)


def test_metala_needs_no_keys_and_stresses_the_token_itself() -> None:
    mixer, x = make(MetaLA, heads=HEADS), tokens()
    seen = silu(shifted_sum(mixer.conv.weight.squeeze(1), x))
    q, logits, v = project(mixer, seen)
    alpha = torch.sigmoid(logits) ** (1 / 16)
    own = (q * mixer.stress[None, :, None] * (1 - alpha)).sum(-1, keepdim=True)
    heads = mixer.head_dim**-0.5 * fading_sum(q, 1 - alpha, v, alpha) + torch.sigmoid(own * v)
    assert_close(mixer(x), mixer.to_out(join_heads(standard(heads)) * silu(mixer.to_gate(seen))))


def rodimus_formula(mixer: Any, x: Tensor) -> Tensor:
    inner = mixer.to_inner(x)
    seen = silu(shifted_sum(mixer.conv.weight.squeeze(1), inner))
    q, k, fading, tempering = (
        split_heads(layer(seen), mixer.heads) for layer in (mixer.to_q, mixer.to_k, mixer.to_fading, mixer.to_tempering)
    )
    gate, temper = softplus(fading), torch.sigmoid(tempering)
    key = gate**temper * k / k.norm(dim=-1, keepdim=True)
    value = split_heads(torch.sigmoid(mixer.to_v(mixer.to_rank(inner))) * inner, mixer.heads)
    heads = mixer.head_dim**-0.5 * fading_sum(q, key, value, torch.exp(-gate * temper))
    out = (join_heads(heads) + mixer.residual * seen) * silu(mixer.to_gate(x))
    return mixer.to_out(rms(out) * mixer.norm.weight)


@pytest.mark.paper("Rodimus / Rodimus+", "definition")
@pytest.mark.parametrize("heads", [1, 3])
def test_rodimus_tempers_its_gate(heads: int) -> None:
    mixer, x = make(Rodimus, heads=heads, memory=5), tokens()
    assert_close(mixer(x), rodimus_formula(mixer, x))


def test_rodimus_survives_closed_gates() -> None:
    mixer, x = Rodimus(DIM, memory=5), torch.randn(2, LENGTH, DIM)
    mixer.to_fading.bias.data.fill_(-200.0)  # softplus(-200) is 0 in float32
    (gradient,) = torch.autograd.grad(mixer(x.requires_grad_()).sum(), x)
    assert gradient.isfinite().all()


def window_formula(mixer: Any, x: Tensor, window: int) -> Tensor:
    q, v = split_heads(mixer.to_q(x), HEADS), split_heads(mixer.to_v(x), HEADS)
    age = ages(x.shape[1])
    logits = mixer.head_dim**-0.5 * q @ mixer.to_k(x).unsqueeze(1).mT
    weights = logits.masked_fill((age < 0) | (age >= window), -torch.inf).softmax(-1)
    return mixer.to_out(join_heads(weights @ v))


@pytest.mark.paper("Rodimus / Rodimus+", "definition")
@pytest.mark.paper("Rodimus / Rodimus+", "works_when")
def test_heads_of_a_window_may_share_the_key_and_not_the_value() -> None:
    mixer, x = make(SharedKeyWindow, heads=HEADS, window=7, rotary=None), tokens()
    assert mixer.to_k.out_features == mixer.head_dim and mixer.to_v.out_features == HEADS * mixer.head_dim
    assert_close(mixer(x), window_formula(mixer, x, 7))


@pytest.mark.paper("Rodimus / Rodimus+", "definition")
@pytest.mark.paper("Rodimus / Rodimus+", "works_when")
def test_rodimus_plus_decodes_at_constant_memory() -> None:
    mixer, x = make(RodimusPlus, heads=HEADS, window=7, memory=5, rotary=None), tokens(60)
    said = rodimus_formula(mixer.recurrent, x)
    normed = rms(x + said) * mixer.norm.weight
    assert_close(mixer(x), said + window_formula(mixer.window, normed, 7))
    with torch.no_grad():
        out, state = decoded(mixer, x, mixer.init_state(2, capacity=10**9))
        _, early = decoded(mixer, x[:, :20], mixer.init_state(2, capacity=10**9))
    assert_close(out, mixer(x))
    assert held(state) == held(early) == 2 * mixer.state_bytes(20_000)


# ---- constant decays and rotations ------------------------------------------------------------------------------


def test_retention_fades_and_rotates() -> None:
    mixer, x = make(Retention, heads=HEADS, rotary=100.0), tokens()
    q, k, v = project(mixer, x)
    half = mixer.head_dim // 2
    angles = torch.arange(LENGTH)[:, None] * 100.0 ** (-torch.arange(half).double() / half)
    turn = torch.polar(torch.ones_like(angles), angles)
    q, k = (torch.complex(y[..., :half], y[..., half:]) * turn for y in (q, k))
    gamma = 1 - 2.0 ** (-5 - torch.arange(HEADS).double())
    fading = (gamma.view(HEADS, 1, 1) ** ages(LENGTH)).tril()
    weights = mixer.head_dim**-0.5 * (q @ k.mH).real * fading
    normed = join_heads(standard(weights @ v))
    assert_close(mixer(x), mixer.to_out(normed * silu(mixer.to_gate(x))))


@pytest.mark.parametrize("heads", [4, 6])
@pytest.mark.parametrize("kind", [LightningAttention, LightningAttention2])
def test_lightning_attention_fades_at_a_rate_of_each_head(kind: type[LightningAttention2], heads: int) -> None:
    mixer, x = make(kind, heads=heads, decay_scale=0.3), tokens()
    q, k, v = project(mixer, x)
    slopes = 0.3 * torch.tensor([2.0 ** (-8 * number / heads) for number in range(1, heads + 1)], dtype=torch.float64)
    weights = mixer.head_dim**-0.5 * silu(q) @ silu(k).mT * torch.exp(-slopes.view(-1, 1, 1) * ages(LENGTH)).tril()
    assert_close(mixer(x), mixer.to_out(rms(join_heads(weights @ v), 1e-6) * mixer.to_gate(x)), rtol=1e-10, atol=1e-10)


@pytest.mark.paper("TransNormerLLM", "definition")
@pytest.mark.parametrize("lrpe", [True, False])
def test_transnormer_fades_and_turns_by_learned_angles(lrpe: bool) -> None:
    mixer, x = make(TransNormerLLM, heads=HEADS, decay_scale=0.7, lrpe=lrpe), tokens()
    q, k, v = project(mixer, x)
    slopes = 0.7 * 2.0 ** (-8 * torch.arange(1, HEADS + 1) / HEADS).double().view(HEADS, 1, 1)
    products = silu(q).unsqueeze(3) * silu(k).unsqueeze(2)  # (B, H, N, N, D)
    if lrpe:
        products = products * torch.cos(ages(LENGTH)[..., None] * mixer.angles[:, None, None])
    weights = mixer.head_dim**-0.5 * products.sum(-1) * torch.exp(-slopes * ages(LENGTH)).tril()
    assert_close(mixer(x), mixer.to_out(rms(join_heads(weights @ v), 1e-6) * mixer.to_gate(x)))


@pytest.mark.paper("TransNormerLLM", "works_when")
@torch.no_grad()
def test_transnormer_decodes_tens_of_thousands_of_tokens_as_it_reads_them() -> None:
    mixer, x = TransNormerLLM(8, 2), torch.randn(1, 40_000, 8)
    whole, state, outs = mixer(x), mixer.init_state(1), []
    for piece in x[:, :39_700].split(150, dim=1):
        out, state = mixer.prefill(piece, state)
        outs.append(out)
    last, state = decoded(mixer, x[:, 39_700:], state)
    assert_close(torch.cat([*outs, last], 1), whole, rtol=1e-3, atol=1e-4)
    assert state.recurrent.isfinite().all() and state.tails[0] == 40_000


@pytest.mark.paper("TransNormerLLM", "works_when")
def test_transnormer_trains() -> None:
    mixer, x = TransNormerLLM(DIM, HEADS), torch.randn(4, 32, DIM)
    target = x.roll(2, dims=1)  # what stood two tokens ago
    optimizer = torch.optim.Adam(mixer.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = (mixer(x) - target)[:, 2:].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_places_start_anew_in_each_document() -> None:
    assert places(6, [2, 0, 4]).tolist() == [0, 1, 0, 1, 2, 3]


# ---- exponential gates ------------------------------------------------------------------------------------------


def mlstm_formula(mixer: Any, x: Tensor) -> Tensor:
    q, k, v = project(mixer, x)
    forget = torch.sigmoid(mixer.to_forget(x)).transpose(1, 2).unsqueeze(-1)
    gate = mixer.to_input(x).transpose(1, 2).unsqueeze(-1).exp()
    scale = mixer.head_dim**-0.5
    total = scale * fading_sum(q, gate * k, v, forget)
    weight = scale * fading_sum(q, gate * k, torch.ones_like(v[..., :1]), forget)
    normed = join_heads(standard(total / weight.abs().clamp(min=1))) * mixer.gain
    return mixer.to_out(normed * torch.sigmoid(mixer.to_gate(x)))


@pytest.mark.parametrize("bias", [-10.0, 0.0, 5.0])
def test_mlstm_is_its_formula(bias: float) -> None:
    mixer, x = make(MLSTM, heads=HEADS), tokens()
    mixer.to_input.bias.data.fill_(bias)
    assert_close(mixer(x), mlstm_formula(mixer, x))


def test_mlstm_survives_gates_that_overflow() -> None:
    mixer, x = make(MLSTM, heads=HEADS), tokens()
    mixer.to_input.bias.data.fill_(20.0)
    large = mlstm_formula(mixer, x)
    assert_close(mixer(x), large)
    mixer.to_input.bias.data.fill_(2000.0)  # exp(2000) is infinite; by then only ratios of gates matter
    assert_close(mixer(x), large, rtol=1e-6, atol=1e-6)
    single = mixer.float()(x.float())
    assert_close(single.double(), large, rtol=1e-2, atol=1e-2)


def test_mlstm_hands_over_its_units() -> None:
    mixer, x = make(MLSTM, heads=HEADS), tokens(50)
    mixer.to_input.weight.data *= 100
    out, state = mixer.prefill(x[:, :20], mixer.init_state(2))
    rest, _ = decoded(mixer, x[:, 20:], state)
    assert_close(torch.cat([out, rest], 1), mixer(x))


def test_mlstm_of_zeros_has_finite_gradients() -> None:
    mixer = MLSTM(DIM, HEADS)
    mixer.to_input.bias.data.fill_(200.0)
    x = torch.zeros(1, 5, DIM, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x).sum(), x)
    assert gradient.isfinite().all()
