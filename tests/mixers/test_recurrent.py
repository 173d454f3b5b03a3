"""The recurrent rows against their papers' formulas, written out token by token or pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.counted_work import work
from tests.support.formulas import agree, follows
from torch import Tensor
from torch.nn.functional import elu, logsigmoid, silu
from torch.testing import assert_close

from foveate.catalogue.registry import row
from foveate.layers.short_conv import ShortConv
from foveate.mixers.base import split_heads
from foveate.mixers.recurrent import RecurrentMixer
from foveate.options import forced_impl
from foveate.patterns import Packed

NAMES = ("linear_transformer", "gla", "gated_deltanet", "lightning_attention_2")
DIM = 24

every_row = pytest.mark.parametrize("name", NAMES)


def make(name: str, *, moved: bool = True, **options: Any) -> RecurrentMixer:
    mixer = row(name).mixer(DIM, **({"heads": 4} | options)).double()
    assert isinstance(mixer, RecurrentMixer)
    for parameter in mixer.parameters() if moved else ():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return mixer


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def project(mixer: RecurrentMixer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        split_heads(mixer.to_q(x), mixer.heads),
        split_heads(mixer.to_k(x), mixer.heads),
        split_heads(mixer.to_v(x), mixer.heads),
    )


def joined(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.paper("Linear Transformer", "definition")
@pytest.mark.paper("Linear Transformer", "works_when")
@pytest.mark.parametrize("causal", [True, False])
def test_linear_transformer_is_attention_with_weights_from_features(causal: bool) -> None:
    mixer, x = row("linear_transformer").mixer(DIM, heads=4, causal=causal).double(), tokens(37).requires_grad_()

    def formula() -> Tensor:
        q, k, v = project(mixer, x)
        weights = (elu(q) + 1) @ (elu(k) + 1).transpose(-1, -2)
        weights = weights.tril() if causal else weights
        return mixer.to_out(joined(weights / weights.sum(-1, keepdim=True) @ v))

    follows(mixer, lambda: mixer(x), formula, x)


@pytest.mark.paper("Linear Transformer", "works_when")
@pytest.mark.parametrize("causal", [True, False])
def test_linear_transformer_takes_any_positive_features(causal: bool) -> None:
    mixer = make("linear_transformer", feature_map=lambda x: torch.cat([x.exp(), (-x).exp()], -1), causal=causal)
    x = tokens(19)
    q, k, v = project(mixer, x)
    weights = 2 * torch.cosh(q.unsqueeze(3) + k.unsqueeze(2)).sum(-1)
    weights = weights.tril() if causal else weights
    assert_close(mixer(x), mixer.to_out(joined(weights / weights.sum(-1, keepdim=True) @ v)))
    if causal:
        state, outs = mixer.init_state(2), []
        for token in x.split(1, dim=1):
            out, state = mixer.decode(token, state)
            outs.append(out)
        assert_close(torch.cat(outs, 1), mixer(x))


def test_linear_transformer_reads_a_context() -> None:
    mixer, x, context = make("linear_transformer", causal=False), tokens(5), tokens(37)
    q, _, _ = project(mixer, x)
    _, k, v = project(mixer, context)
    weights = (elu(q) + 1) @ (elu(k) + 1).transpose(-1, -2)
    expected = mixer.to_out(joined(weights / weights.sum(-1, keepdim=True) @ v))
    assert_close(mixer(x, context=context), expected)
    with pytest.raises(ValueError, match="packed layout"):
        mixer(x, context=context, layout=Packed([30, 7]))


def test_the_divisor_does_not_overflow_float16() -> None:
    mixer = row("linear_transformer").mixer(8, heads=1).half()
    for layer in (mixer.to_q, mixer.to_k):
        layer.weight.data.fill_(8.0)
    x = torch.ones(1, 65, 8, dtype=torch.float16)  # 65 * 8 * 65**2 is far beyond float16
    assert_close(mixer(x)[0, 64], mixer(x)[0, 0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("lightning_attention_2", marks=pytest.mark.paper("Lightning-Attention-2", "definition")),
        pytest.param("lightning_attention", marks=pytest.mark.paper("Lightning-Attention-TNL", "definition")),
    ],
)
def test_lightning_attention_fades_at_a_constant_rate(name: str) -> None:
    mixer, x = make(name, decay_scale=0.5), tokens(37)
    q, k, v = project(mixer, x)
    age = (torch.arange(37)[:, None] - torch.arange(37)).double()
    rate = 0.5 * torch.tensor([2**-2, 2**-4, 2**-6, 2**-8], dtype=torch.float64).view(4, 1, 1)
    weights = mixer.head_dim**-0.5 * (silu(q) @ silu(k).transpose(-1, -2)) * torch.exp(-rate * age).tril()
    expected = mixer.to_out(rms(joined(weights @ v), 1e-6) * mixer.to_gate(x))
    assert_close(mixer(x), expected)


def gla_formula(mixer: RecurrentMixer, x: Tensor) -> Tensor:
    q, k, v = project(mixer, x)
    alpha = split_heads((logsigmoid(mixer.to_decay(mixer.to_rank(x))) / 16).exp(), 4)
    state, outs = torch.zeros(len(x), 4, k.shape[-1], v.shape[-1], dtype=torch.float64), []
    for t in range(x.shape[1]):
        state = alpha[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append(k.shape[-1] ** -0.5 * (q[:, :, t, None, :] @ state))
    normed = rms(torch.cat(outs, 2), 1e-5) * mixer.norm.norm.weight
    return mixer.to_out(joined(normed) * silu(mixer.norm.to_gate(x)))


@pytest.mark.paper("GLA", "definition")
@pytest.mark.parametrize("moved", [True, False])
def test_gla_fades_each_key_channel(moved: bool) -> None:
    mixer, x = make("gla", moved=moved), tokens(37).requires_grad_()
    agree(mixer(x), gla_formula(mixer, x), x, mixer)
    assert (mixer.head_dim, mixer.value_dim, mixer.to_rank.out_features) == (3, 6, 16)  # type: ignore[union-attr]


@pytest.mark.paper("GLA", "works_when")
@pytest.mark.parametrize("impl", ["chunks", "reference", None])
@pytest.mark.parametrize("shut", [0.0, 5.0, 3000.0])
def test_gla_has_the_gradients_of_its_formula_however_far_its_gates_are_shut(shut: float, impl: str | None) -> None:
    mixer, x = make("gla"), tokens(83).requires_grad_()
    mixer.to_decay.bias.data -= shut * torch.rand_like(mixer.to_decay.bias)  # some channels forget at once
    wanted, towards = [x, *mixer.parameters()], tokens(83)
    with forced_impl(impl):
        found = torch.autograd.grad((mixer(x) * towards).sum(), wanted)
    expected = torch.autograd.grad((gla_formula(mixer, x) * towards).sum(), wanted)
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("linear_transformer", marks=pytest.mark.paper("Linear Transformer", "works_when")),
        pytest.param("gla", marks=pytest.mark.paper("GLA", "works_when")),
        "gated_deltanet",
        "lightning_attention_2",
    ],
)
def test_counted_work_is_linear_in_tokens(name: str) -> None:
    mixer = row(name).mixer(DIM, heads=4)
    counted = [work(lambda: mixer(torch.randn(1, n, DIM))) for n in (1024, 2048, 4096)]  # noqa: B023
    assert 1.9 < counted[1] / counted[0] < 2.1 and 1.9 < counted[2] / counted[1] < 2.1


@pytest.mark.paper("Gated DeltaNet", "definition")
def test_gated_deltanet_fades_erases_and_writes() -> None:
    mixer, x = make("gated_deltanet"), tokens(37)
    q, k, v = (convolved(mixer, i, layer(x)) for i, layer in enumerate((mixer.to_q, mixer.to_k, mixer.to_v)))
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    alpha = torch.exp(-mixer.A_log.exp() * torch.log1p(mixer.to_decay(x).exp())).transpose(1, 2)
    beta = torch.sigmoid(mixer.to_strength(x)).transpose(1, 2)
    eye = torch.eye(mixer.head_dim, dtype=torch.float64)
    state, outs = torch.zeros(2, 4, mixer.head_dim, mixer.value_dim, dtype=torch.float64), []
    for t in range(37):
        key, strength = k[:, :, t, :, None], beta[:, :, t, None, None]
        erase = alpha[:, :, t, None, None] * (eye - strength * key @ key.mT)
        state = erase @ state + strength * key @ v[:, :, t, None, :]
        outs.append(mixer.head_dim**-0.5 * (q[:, :, t, None, :] @ state))
    normed = rms(torch.cat(outs, 2), 1e-5) * mixer.norm.norm.weight
    assert_close(mixer(x), mixer.to_out(joined(normed) * silu(mixer.norm.to_gate(x))))


def convolved(mixer: RecurrentMixer, which: int, flat: Tensor) -> Tensor:
    taps = mixer.convs[which].weight.squeeze(1)  # (channels, width), the last tap reads the token itself
    shifted = [torch.cat([torch.zeros_like(flat[:, :age]), flat[:, : 37 - age]], 1) for age in range(4)]
    return split_heads(silu(sum(taps[:, 3 - age] * shifted[age] for age in range(4))), mixer.heads)


@pytest.mark.paper("GLA", "works_when")
@pytest.mark.paper("Linear Transformer", "works_when")
@every_row
def test_a_sequence_in_chunks_is_the_sequence(name: str) -> None:
    mixer, x = make(name, kv_heads=2), tokens(70)
    state, outs = mixer.init_state(2), []
    for chunk in x.split([1, 0, 37, 2, 30], dim=1):
        out, state = mixer.prefill(chunk, state)
        outs.append(out)
    assert_close(torch.cat(outs, 1), mixer(x))
    assert mixer.state_bytes(70) * 2 == sum(t.nbytes for t in (state.recurrent, *state.tails))


@every_row
def test_a_packed_batch_is_its_documents(name: str) -> None:
    mixer, x, lengths = make(name), tokens(40), [3, 0, 36, 1]
    expected = torch.cat([mixer(piece) for piece in x.split(lengths, dim=1)], 1)
    assert_close(mixer(x, layout=Packed(lengths)), expected)
    padding = torch.rand(2, 40) > 0.2
    padding[:, :4], padding[:, 37:] = True, True
    with_padding = [
        mixer(piece, padding=real) for piece, real in zip(x.split(lengths, 1), padding.split(lengths, 1), strict=True)
    ]
    assert_close(mixer(x, layout=Packed(lengths), padding=padding), torch.cat(with_padding, 1))
    assert mixer(x[:, :0], layout=Packed([0, 0])).shape == (2, 0, DIM)


@every_row
def test_a_hidden_token_neither_writes_nor_fades(name: str) -> None:
    mixer = make(name, **({"conv": 0} if name == "gated_deltanet" else {}))
    x, real = tokens(40, batch=1), torch.rand(1, 40) < 0.6
    assert_close(mixer(x, padding=real)[real], mixer(x[real].unsqueeze(0))[0])


@every_row
def test_padding_may_even_be_nan(name: str) -> None:
    mixer, x, real = make(name), tokens(40), torch.rand(2, 40) < 0.6
    broken = x.masked_fill(~real.unsqueeze(-1), torch.nan)
    assert_close(mixer(broken, padding=real), mixer(x, padding=real), rtol=0, atol=0)


def test_padding_of_a_context_may_even_be_nan() -> None:
    mixer, x, context = make("linear_transformer", causal=False), tokens(5), tokens(40)
    real = torch.rand(2, 40) < 0.6
    broken = context.masked_fill(~real.unsqueeze(-1), torch.nan)
    assert_close(mixer(x, context=broken, padding=real), mixer(x, context=context, padding=real))


@every_row
def test_half_precision_states_are_float32(name: str) -> None:
    mixer = row(name).mixer(DIM, heads=4).bfloat16()
    x = tokens(9).bfloat16()
    out, state = mixer.prefill(x, mixer.init_state(2))
    assert out.dtype == torch.bfloat16
    assert state.recurrent.dtype == torch.float32


def test_the_gates_start_where_the_papers_start_them() -> None:
    mixer = row("gated_deltanet").mixer(512, heads=512)
    pace = torch.nn.functional.softplus(mixer.to_decay.bias)
    rate = mixer.A_log.exp()
    assert pace.min() > 0.00099 and pace.max() < 0.101
    assert rate.min() > 0.999 and rate.max() < 16.001
    assert pace.log().std().item() == pytest.approx(4.605 / 12**0.5, rel=0.2)


def test_a_convolution_reads_its_own_document_only() -> None:
    conv, x = ShortConv(6, 4).double(), torch.randn(1, 9, 6, dtype=torch.float64)
    out = conv(x, lengths=[2, 0, 7]).out
    x[:, :2] += 100
    assert_close(conv(x, lengths=[2, 0, 7]).out[:, 2:], out[:, 2:], rtol=0, atol=0)


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="kv_heads must divide heads"):
        make("gla", kv_heads=3)
    with pytest.raises(ValueError, match="noncausal"):
        make("gla", causal=False)
    with pytest.raises(ValueError, match="temperature"):
        make("gla", temperature=0)
    with pytest.raises(ValueError, match="decay_scale"):
        make("lightning_attention_2", decay_scale=-1)
    with pytest.raises(ValueError, match="at least one token"):
        ShortConv(4, 0)
    with pytest.raises(NotImplementedError, match="unless causal"):
        make("linear_transformer", causal=False).init_state(1)
