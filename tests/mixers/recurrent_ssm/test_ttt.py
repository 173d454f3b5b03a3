"""TTT-Linear and TTT-MLP as mixers: their parts written out, padding, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from foveate.catalogue.registry import row
from foveate.mixers.recurrent_ssm.ttt import TTTMixer
from foveate.mixers.recurrent_ssm.ttt_video import TTTVideo
from foveate.patterns import Grid, Layout, Packed, Sequence

every_row = pytest.mark.parametrize("name", ["ttt_linear", "ttt_mlp"])
DIM, HEADS, BATCH = 12, 2, 4


def make(name: str) -> TTTMixer:
    mixer = row(name).mixer(DIM, heads=HEADS, mini_batch=BATCH).double()
    assert isinstance(mixer, TTTMixer)
    for parameter in mixer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return mixer


def turned(x: Tensor, place: int) -> Tensor:
    """One head's query or key (D,) turned by its place: channels c and c + D / 2 are a complex number."""
    half = x.shape[-1] // 2
    angles = place * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    number = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([number.real, number.imag])


def written_out(mixer: TTTMixer, x: Tensor) -> Tensor:
    """The layer over one sequence x (N, C), token by token; gradients pass through what is learned."""
    length, width = len(x), DIM // HEADS
    heads = []
    for h in range(HEADS):
        own = slice(h * width, (h + 1) * width)
        read, entered, total = [], [weight[h] for weight in mixer.inner], []

        def net(token: Tensor, weights: list[Tensor], h: int = h) -> Tensor:
            z = token @ weights[0][:-1] + weights[0][-1]
            if len(weights) == 2:
                z = gelu(z, approximate="tanh") @ weights[1][:-1] + weights[1][-1]
            unit = (z - z.mean()) / (z.var(correction=0) + 1e-6).sqrt()
            return token + unit * mixer.norm_weight[h] + mixer.norm_bias[h]

        for t in range(length):
            place = t % BATCH
            total = [torch.zeros_like(w) for w in entered] if place == 0 else total
            q, k = (turned((x[t] @ project.weight.mT)[own], place) for project in (mixer.to_q, mixer.to_k))
            loss = (net(k, entered) - (x[t] @ mixer.to_v.weight.mT)[own]).square().sum() / 2
            eta = mixer.rate * torch.sigmoid(x[t] @ mixer.to_rate.weight[h] + mixer.to_rate.bias[h]) / width
            gradients = torch.autograd.grad(loss, entered, create_graph=True)
            total = [old + eta * new for old, new in zip(total, gradients, strict=True)]
            step_scale = (1 / (place + 1) + mixer.step_scale[place]).clamp(min=0)
            now = [w - step_scale * step for w, step in zip(entered, total, strict=True)]
            read.append(net(q, now))
            entered = now if place == BATCH - 1 else entered
        heads.append(torch.stack(read))
    joined = layer_norm(torch.cat(heads, 1), (DIM,), mixer.norm.weight, mixer.norm.bias, eps=1e-6)
    return joined @ mixer.to_out.weight.mT


@pytest.mark.paper("TTT", "definition")
@every_row
@pytest.mark.parametrize("begun", [True, False], ids=["as it begins", "shaken"])
def test_the_layer_is_the_paper_s_written_out(name: str, begun: bool) -> None:
    mixer = row(name).mixer(DIM, heads=HEADS, mini_batch=BATCH).double() if begun else make(name)
    assert isinstance(mixer, TTTMixer)
    x = torch.randn(11, DIM, dtype=torch.float64, requires_grad=True)
    out, expected = mixer(x[None])[0], written_out(mixer, x)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-9)
    towards, wanted = torch.randn_like(out), [x, *mixer.parameters()]
    mine, plain = (torch.autograd.grad((each * towards).sum(), wanted) for each in (out, expected))
    torch.testing.assert_close(mine, plain, atol=1e-8, rtol=1e-7)
    assert all(bool((gradient != 0).any()) for gradient in mine)


@pytest.mark.paper("TTT", "works_when")
@every_row
def test_it_decodes_token_by_token_from_its_state(name: str) -> None:
    mixer, x = make(name), torch.randn(1, 15, DIM, dtype=torch.float64)
    out, state = mixer.prefill(x[:, :6], mixer.init_state(1))
    outs = [out]
    for t in range(6, 15):
        out, state = mixer.decode(x[:, t : t + 1], state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1)[0], written_out(mixer, x[0]), atol=1e-9, rtol=1e-9)
    numbers = [sum(part.numel() for part in (*each.weights, *each.pending)) for each in (state, mixer.init_state(1))]
    assert numbers[0] == numbers[1]  # as much after 15 tokens as after none


@pytest.mark.paper("TTT", "works_when")
@every_row
def test_no_later_token_reaches_an_output(name: str) -> None:
    mixer, x = make(name), torch.randn(1, 11, DIM, dtype=torch.float64)
    for t in (1, 5, 8):
        later = torch.cat([x[:, :t], torch.randn_like(x[:, t:])], 1)
        torch.testing.assert_close(mixer(later)[:, :t], mixer(x)[:, :t], atol=1e-12, rtol=1e-12)


@pytest.mark.paper("TTT", "definition")
@every_row
def test_the_layer_begins_as_the_authors_does(name: str) -> None:
    mixer = row(name).mixer(64, heads=4)
    assert isinstance(mixer, TTTMixer) and mixer.mini_batch == 16 and not mixer.step_scale.any()
    shapes = {"ttt_linear": [(4, 17, 16)], "ttt_mlp": [(4, 17, 64), (4, 65, 16)]}[name]
    assert [tuple(weight.shape) for weight in mixer.inner] == shapes
    for weight in (*(inner[:, :-1] for inner in mixer.inner), mixer.to_rate.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.25)
    assert not any(inner[:, -1].any() for inner in mixer.inner)
    assert torch.equal(mixer.norm_weight, torch.ones(4, 16)) and not mixer.norm_bias.any()


@every_row
def test_padding_anywhere_is_as_if_it_were_not_there(name: str) -> None:
    mixer, x = make(name), torch.randn(3, 17, DIM, dtype=torch.float64)
    real = torch.rand(3, 17) < 0.6
    out = mixer(x, padding=real)
    for b in range(3):
        torch.testing.assert_close(out[b, real[b]], mixer(x[b : b + 1, real[b]])[0])


def test_padding_beside_a_packed_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        make("ttt_linear")(
            torch.randn(1, 5, DIM, dtype=torch.float64),
            layout=Packed([2, 3]),
            padding=torch.ones(1, 5, dtype=torch.bool),
        )


@every_row
def test_learning_rates_start_at_half_the_greatest(name: str) -> None:
    mixer = row(name).mixer(DIM, heads=HEADS)
    assert torch.sigmoid(mixer.to_rate(torch.zeros(1, DIM))).tolist() == [[0.5] * HEADS]
    assert mixer.rate == {"ttt_linear": 1.0, "ttt_mlp": 0.1}[name]


def test_a_mini_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        row("ttt_mlp").mixer(DIM, heads=HEADS, mini_batch=0)


# ---- TTT-Video ---------------------------------------------------------------------------------------------


def video(**options: Any) -> TTTVideo:
    mixer = TTTVideo(DIM, heads=HEADS, segment=10, mini_batch=BATCH, **options).double()
    for gate in (mixer.forwards, mixer.backwards):
        gate.data += 0.1 * torch.randn_like(gate)
    return mixer


def test_video_gates_both_directions_around_attention_to_segments() -> None:
    mixer, x = video(), torch.randn(2, 30, DIM, dtype=torch.float64)
    near = torch.cat([mixer.attention(segment) for segment in x.split(10, dim=1)], dim=1)
    ahead = near + mixer.forwards.tanh() * mixer.ttt(near)
    back = mixer.ttt(ahead.flip(1)).flip(1)
    torch.testing.assert_close(mixer(x), ahead + mixer.backwards.tanh() * back)


@pytest.mark.parametrize("layout", [Grid(3, 2, 5), Grid(5, 6), Sequence(30)])
def test_video_reads_a_grid_frame_after_frame(layout: Layout) -> None:
    mixer, x = video(), torch.randn(2, 30, DIM, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, layout=layout), mixer(x))


def test_video_with_closed_gates_is_the_attention_it_was_given() -> None:
    attention = row("flash_attention").mixer(DIM, heads=HEADS, causal=False).double()
    mixer, x = TTTVideo(DIM, heads=HEADS, gate=0.0, attention=attention).double(), torch.randn(1, 20, DIM).double()
    torch.testing.assert_close(mixer(x), attention(x))


def test_video_segments_hear_of_one_another_only_through_the_gates() -> None:
    for gate, hears in ((0.1, True), (0.0, False)):
        x = torch.randn(1, 30, DIM, requires_grad=True)
        out = TTTVideo(DIM, heads=HEADS, segment=10, mini_batch=BATCH, gate=gate)(x)
        (gradient,) = torch.autograd.grad(out[0, 15].sum(), x)
        others = torch.cat([gradient[0, :10], gradient[0, 20:]]).abs().amax(-1)
        assert bool((others > 0).any()) == hears
