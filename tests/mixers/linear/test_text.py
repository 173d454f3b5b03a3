"""Linear attention for text against its papers' formulas, written out token by token or pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.formulas import agree
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
from torch.nn.functional import cross_entropy, silu, softplus
from torch.testing import assert_close

from foveate.catalogue.tiers import row
from foveate.mixers.base import join_heads, split_heads
from foveate.mixers.linear.hgrn2 import HGRN2
from foveate.mixers.linear.lightning_attention import LightningAttention, LightningAttention2
from foveate.mixers.linear.metala import MetaLA
from foveate.mixers.linear.mlstm import MLSTM
from foveate.mixers.linear.positions import places
from foveate.mixers.linear.retention import Retention
from foveate.mixers.linear.rodimus import Rodimus
from foveate.mixers.linear.rodimus_plus import RodimusPlus
from foveate.mixers.linear.shared_key_window import SharedKeyWindow
from foveate.mixers.linear.transnormer_llm import TransNormerLLM
from foveate.models.builtin import heldout_text
from foveate.models.lm import transnormer
from foveate.options import forced_impl

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
    seen = silu(shifted_sum(mixer.conv.weight.squeeze(1), inner) + mixer.conv.bias)
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
@pytest.mark.paper("Rodimus / Rodimus+", "works_when")
@pytest.mark.parametrize("impl", ["chunks", "reference", None])
@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
def test_rodimus_tempers_its_gate(heads: int, moved: bool, impl: str | None) -> None:
    mixer, x = make(Rodimus, moved=moved, heads=heads, memory=5), tokens(70).requires_grad_()
    with forced_impl(impl):
        said = mixer(x)
        agree(said, rodimus_formula(mixer, x), x, mixer)


@pytest.mark.paper("Rodimus / Rodimus+", "definition")
def test_rodimus_starts_with_the_gates_of_its_authors() -> None:
    mixer = Rodimus(DIM, memory=4000)
    assert (mixer.head_dim, mixer.value_dim, mixer.to_rank.out_features) == (4000, 2 * DIM, 16)
    assert Rodimus(DIM).head_dim == 64 and Rodimus(2048, memory=1).to_rank.out_features == 32
    gate, temper = softplus(mixer.to_fading.bias).log10(), torch.sigmoid(mixer.to_tempering.bias)
    for found, low, high in ((gate, -3.0, -1.0), (temper, 1 / 16, 0.9)):  # both uniform
        assert low - 1e-3 < found.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < found.max() < high + 1e-3
        assert abs(found.mean() - (low + high) / 2) < 0.03 * (high - low)
    assert mixer.residual.eq(1).all() and mixer.conv.weight.shape == (2 * DIM, 1, 4)


def test_rodimus_survives_closed_gates() -> None:
    mixer, x = Rodimus(DIM, memory=5), torch.randn(2, LENGTH, DIM)
    mixer.to_fading.bias.data.fill_(-200.0)  # softplus(-200) is 0 in float32
    (gradient,) = torch.autograd.grad(mixer(x.requires_grad_()).sum(), x)
    assert gradient.isfinite().all()


def turned(x: Tensor, base: float) -> Tensor:
    """Channels c and c + D / 2 of token t as a complex number, turned by t base^(-2c / D)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * base ** (-torch.arange(half).double() / half)
    pair = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pair.real, pair.imag], -1)


def window_formula(mixer: Any, x: Tensor, window: int, rotary: float | None) -> Tensor:
    q, v = split_heads(mixer.to_q(x), HEADS), split_heads(mixer.to_v(x), HEADS)
    k, age = mixer.to_k(x).unsqueeze(1), ages(x.shape[1])
    q, k = (q, k) if rotary is None else (turned(q, rotary), turned(k, rotary))
    logits = mixer.head_dim**-0.5 * q @ k.mT
    weights = logits.masked_fill((age < 0) | (age >= window), -torch.inf).softmax(-1)
    return mixer.to_out(join_heads(weights @ v))


@pytest.mark.paper("Rodimus / Rodimus+", "definition")
@pytest.mark.paper("Rodimus / Rodimus+", "works_when")
@pytest.mark.parametrize("rotary", [None, 100.0])
def test_heads_of_a_window_may_share_the_key_and_not_the_value(rotary: float | None) -> None:
    mixer, x = make(SharedKeyWindow, heads=HEADS, window=7, rotary=rotary), tokens().requires_grad_()
    assert mixer.to_k.out_features == mixer.head_dim and mixer.to_v.out_features == HEADS * mixer.head_dim
    agree(mixer(x), window_formula(mixer, x, 7, rotary), x, mixer)


@pytest.mark.paper("Rodimus / Rodimus+", "definition")
@pytest.mark.paper("Rodimus / Rodimus+", "works_when")
def test_rodimus_plus_decodes_at_constant_memory() -> None:
    mixer, x = make(RodimusPlus, heads=HEADS, window=7, memory=5, rotary=100.0), tokens(60).requires_grad_()
    said = rodimus_formula(mixer.recurrent, x)
    normed = rms(x + said) * mixer.norm.weight
    agree(mixer(x), said + window_formula(mixer.window, normed, 7, 100.0), x, mixer)
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


def transnormer_formula(mixer: Any, x: Tensor, scale: float, lrpe: bool) -> Tensor:
    (q, k, v), age, heads = project(mixer, x), ages(x.shape[1]), mixer.heads
    slopes = scale * 2.0 ** (-8 * torch.arange(1, heads + 1) / heads).double().view(heads, 1, 1)
    products = silu(q).unsqueeze(3) * silu(k).unsqueeze(2)  # (B, H, N, N, D)
    if lrpe:
        products = products * torch.cos(age[..., None] * mixer.angles[:, None, None])
    weights = q.shape[-1] ** -0.5 * products.sum(-1) * torch.exp(-slopes * age).tril()
    return mixer.to_out(rms(join_heads(weights @ v), 1e-6) * mixer.to_gate(x))


@pytest.mark.paper("TransNormerLLM", "definition")
@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("lrpe", [True, False])
def test_transnormer_fades_and_turns_by_learned_angles(lrpe: bool, moved: bool) -> None:
    mixer = make(TransNormerLLM, moved=moved, heads=HEADS, decay_scale=0.7, lrpe=lrpe)
    x = tokens().requires_grad_()
    agree(mixer(x), transnormer_formula(mixer, x, 0.7, lrpe), x, mixer)


@pytest.mark.paper("TransNormerLLM", "definition")
def test_transnormer_starts_with_angles_that_fall_over_all_heads() -> None:
    """10000^(-2 c / C) of channel c among the C of all heads."""
    angles = TransNormerLLM(DIM, HEADS).angles
    assert angles is not None
    expected = [10_000 ** (-2 * channel / DIM) for channel in range(DIM)]
    assert_close(angles.flatten(), torch.tensor(expected))


@pytest.mark.paper("TransNormerLLM", "definition")
@pytest.mark.parametrize("depth", [1, 3])
def test_the_model_transnormer_is_its_layers(depth: int) -> None:
    """LRPE in the first layer alone, decays that fall from layer to layer, norms without weights, a bilinear GLU."""
    model = transnormer(11, dim=DIM, depth=depth, heads=HEADS, hidden=30).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ids = torch.randint(11, (2, 13))
    x = DIM**0.5 * model.embed.weight[ids]
    for index, layer in enumerate(model.layers):
        scale = 1 - index / max(depth - 1, 1) + 1e-5
        x = x + transnormer_formula(layer.mixer, rms(x, 1e-6), scale, lrpe=index == 0)
        normed = rms(x, 1e-6)
        hidden = (normed @ layer.channels.gate.weight.mT) * (normed @ layer.channels.value.weight.mT)
        x = x + hidden @ layer.channels.to_out.weight.mT
    agree(model(ids), rms(x, 1e-6) @ model.head.weight.mT, model.embed.weight, model)


@pytest.mark.paper("TransNormerLLM", "definition")
def test_the_presets_of_transnormer_have_the_papers_sizes() -> None:
    for name, dim, depth, heads, millions in (("385M", 1024, 24, 8, 334), ("1B", 2048, 16, 16, 886)):
        found = built(name)
        assert (found.embed.embedding_dim, len(found.layers)) == (dim, depth)
        assert {layer.mixer.heads for layer in found.layers} == {heads}
        assert abs(sum(p.numel() for p in found.layers.parameters()) / 1e6 - millions) < 0.02 * millions


def built(preset: str) -> Any:
    with torch.device("meta"):
        return row("transnormer").make(preset)  # type: ignore[attr-defined]


def loss_on_code(model: Any, length: int, windows: Tensor, text: Tensor) -> Tensor:
    seen = torch.stack([text[start : start + length + 1] for start in windows.tolist()])
    return cross_entropy(model(seen[:, :-1]).flatten(0, 1), seen[:, 1:].flatten())


def trained_on_code(text: Tensor, **options: Any) -> float:
    """Nats a byte of code not trained on, after 80 steps, always the same ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, draw = transnormer(128, dim=32, depth=2, heads=4, hidden=64, **options), torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(80):
            loss = loss_on_code(model, 64, torch.randint(50_000, (8,), generator=draw), text)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return float(loss_on_code(model, 128, torch.arange(51_000, 54_000, 150), text))


@pytest.mark.paper("TransNormerLLM", "works_when")
def test_transnormer_learns_code_better_than_linear_attention_without_decay_and_lrpe() -> None:
    text = torch.tensor(list(heldout_text(56_000).encode())).clamp(max=127)
    faded, even = trained_on_code(text), trained_on_code(text, decay_scale=0.0, lrpe=False)
    assert faded < 0.95 * even, (faded, even)


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
