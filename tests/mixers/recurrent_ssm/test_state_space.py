"""Time-invariant state spaces: convolution, recurrence and plain loops agree; S4D, S5 and H3 are their formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support.formulas import follows
from tests.support.scan_formulas import DIM, shaken, tokens
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.testing import assert_close

from foveate import Packed
from foveate.mixers.recurrent_ssm.diagonal import DiagonalSSM
from foveate.mixers.recurrent_ssm.h3 import H3
from foveate.mixers.recurrent_ssm.s4d import S4D
from foveate.mixers.recurrent_ssm.s5 import S5
from foveate.options import forced_impl
from foveate.recurrence.ssm import discretize, evolve, evolve_shared, fft_conv, hippo_rates, kernel, remembered


def coefficients(channels: int = 3, states: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    transition = torch.complex(-torch.rand(channels, states).double(), 3 * torch.randn(channels, states).double())
    return transition, *torch.randn(2, channels, states, dtype=torch.complex128)


def plain(x: Tensor, transition: Tensor, write: Tensor, read: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """As real 2 x 2 rotations, channel by channel and token by token."""
    out = torch.zeros_like(x)
    turn = transition.exp()
    h = torch.view_as_real(state).clone()  # (B, C, S, 2)
    matrix = torch.stack([torch.stack([turn.real, -turn.imag], -1), torch.stack([turn.imag, turn.real], -1)], -2)
    for t in range(x.shape[1]):
        h = (matrix @ h.unsqueeze(-1)).squeeze(-1) + torch.view_as_real(write) * x[:, t, :, None, None]
        out[:, t] = 2 * (read.real * h[..., 0] - read.imag * h[..., 1]).sum(-1)
    return out, torch.view_as_complex(h)


@pytest.mark.paper("H3", "works_when")
@pytest.mark.parametrize("impl", ["reference", "fft"])
@pytest.mark.parametrize("length", [1, 2, 37, 130])
@pytest.mark.parametrize("chunk", [None, 1, 16])
def test_every_form_is_the_recurrence(impl: str, length: int, chunk: int | None) -> None:
    x, given = torch.randn(2, length, 3, dtype=torch.float64), coefficients()
    state = torch.randn(2, 3, 5, dtype=torch.complex128)
    expected, left = plain(x, *given, state)
    found = evolve(x, *given, state=state, impl=impl, chunk=chunk)
    assert_close(found.out, expected)
    assert_close(found.state, left)
    expected, left = plain(x, *given, torch.zeros_like(state))
    found = evolve(x, *given, impl=impl, chunk=chunk)
    assert_close(found.out, expected)
    assert_close(found.state, left)
    assert_close(evolve(x, *given, impl=impl, chunk=chunk, final=False).out, expected)


@pytest.mark.paper("H3", "works_when")
def test_every_form_has_the_same_gradients() -> None:
    x, state = torch.randn(2, 30, 3, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.complex128)
    wanted = [each.requires_grad_() for each in (x, *coefficients(), state)]
    towards = torch.randn_like(x)

    def gradients(**options: Any) -> tuple[Tensor, ...]:
        out, after = evolve(*wanted[:4], state=state, **options)
        assert after is not None
        return torch.autograd.grad((out * towards).sum() + torch.view_as_real(after).sum(), wanted)

    expected = gradients(impl="reference")
    for options in ({"impl": "fft"}, {"impl": "fft", "chunk": 7}):
        assert_close(gradients(**options), expected)


def test_the_kernel_is_the_response_to_an_impulse() -> None:
    transition, write, read = coefficients()
    impulse = torch.zeros(1, 50, 3, dtype=torch.float64)
    impulse[:, 0] = 1.0
    response = evolve(impulse, transition, write, read, impl="reference").out[0].mT
    assert_close(kernel(transition, write * read, 50), response)
    for length in (1, 2, 16, 17):
        assert_close(kernel(transition, write * read, length), response[:, :length])


@pytest.mark.paper("H3", "works_when")
def test_convolutions_do_not_wrap_round() -> None:
    x, filters = torch.randn(2, 23, 3, dtype=torch.float64), torch.randn(3, 23, dtype=torch.float64)
    age = torch.arange(23)[:, None] - torch.arange(23)
    toeplitz = torch.where(age >= 0, filters[:, age.clamp(min=0)], 0)  # (C, N, N)
    assert_close(fft_conv(x, filters), (toeplitz @ x.mT.unsqueeze(-1)).squeeze(-1).mT)
    short = torch.cat([filters[:, :4], torch.zeros(3, 19).double()], 1)
    assert_close(fft_conv(x, filters[:, :4]), fft_conv(x, short))
    late = x.clone()
    late[:, 20:] += 100.0
    assert_close(fft_conv(late, filters)[:, :20], fft_conv(x, filters)[:, :20], rtol=0, atol=1e-11)


def test_what_states_hold_is_a_sum_over_the_past() -> None:
    transition, x = coefficients()[0], torch.randn(2, 21, 3, dtype=torch.float64)
    ages = torch.arange(20, -1, -1)
    expected = torch.einsum("bnc,csn->bcs", x.to(torch.complex128), (transition.unsqueeze(-1) * ages).exp())
    assert_close(remembered(x, transition), expected)


@pytest.mark.parametrize("length", [1, 2, 9, 64, 77])
def test_the_parallel_scan_is_the_recurrence(length: int) -> None:
    transition = coefficients()[0][0]
    u, state = torch.randn(2, length, 5, dtype=torch.complex128), torch.randn(2, 5, dtype=torch.complex128)
    h, expected = state, []
    for t in range(length):
        h = transition.exp() * h + u[:, t]
        expected.append(h)
    for impl in ("reference", "doubling"):
        states, last = evolve_shared(u, transition, state=state, impl=impl)
        assert_close(states, torch.stack(expected, 1))
        assert_close(last, h)


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_small_steps_follow_the_differential_equation(method: str) -> None:
    rates, span, inputs = hippo_rates(4).to(torch.complex128), 1.0, 0.7
    exact = inputs * ((rates * span).exp() - 1) / rates
    transition, entry = discretize(rates, torch.tensor(span / 1000, dtype=torch.float64), method)
    h = torch.zeros_like(rates)
    for _ in range(1000):
        h = transition.exp() * h + entry * inputs
    assert_close(h, exact, rtol=1e-4, atol=1e-4)


def test_rates_are_the_eigenvalues_of_the_normal_part_of_hippo() -> None:
    order = torch.arange(8).double()
    legs = -torch.tril((2 * order[:, None] + 1).sqrt() * (2 * order + 1).sqrt(), -1) - torch.diag(order + 1)
    low = (order + 0.5).sqrt()
    eigenvalues = torch.linalg.eigvals(legs + torch.outer(low, low))
    upper = eigenvalues[eigenvalues.imag > 0]
    assert_close(hippo_rates(4).to(torch.complex128), upper[upper.imag.argsort()], rtol=1e-5, atol=1e-5)


def rates_of(dynamics: nn.Module) -> Tensor:
    return torch.complex(-dynamics.log_decay.exp(), dynamics.frequency)


def held(rates: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """What is kept of a state in a step, and what enters it of an input that is held."""
    kept = torch.exp(rates * step)
    return kept, (kept - 1) / rates


def trapezoidal(rates: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the trapezoidal rule."""
    return (1 + rates * step / 2) / (1 - rates * step / 2), step / (1 - rates * step / 2)


def diagonal(ssm: DiagonalSSM, x: Tensor, discrete: Callable[..., tuple[Tensor, Tensor]] = held) -> Tensor:
    kept, entry = discrete(rates_of(ssm.dynamics), ssm.dynamics.log_step.exp()[:, None])
    h, outs = torch.zeros(len(x), *kept.shape, dtype=kept.dtype), []
    for token in x.unbind(1):
        h = kept * h + entry * token.unsqueeze(-1)
        outs.append(2 * (torch.view_as_complex(ssm.read) * h).sum(-1).real + ssm.D * token)
    return torch.stack(outs, 1)


def test_s4d_is_a_state_space_in_each_channel() -> None:
    mixer, x = shaken(S4D(DIM, state=8)), tokens(40)
    out, gate = mixer.to_out(gelu(diagonal(mixer.ssm, x))).chunk(2, -1)
    assert_close(mixer(x), out * torch.sigmoid(gate))


def test_s5_is_one_state_space_for_all_channels() -> None:
    mixer, x = shaken(S5(DIM, state=8)), tokens(40)
    kept, entry = held(rates_of(mixer.dynamics), mixer.dynamics.log_step.exp())
    write = entry[:, None] * torch.view_as_complex(mixer.write)
    h, outs = torch.zeros(2, 4, dtype=torch.complex128), []
    for token in x.unbind(1):
        h = kept * h + token.to(h.dtype) @ write.mT
        outs.append(2 * (h @ torch.view_as_complex(mixer.read).mT).real + mixer.D * token)
    g = gelu(torch.stack(outs, 1))
    assert_close(mixer(x), g * torch.sigmoid(mixer.to_gate(g)))


def test_s5_is_a_convolution_too() -> None:
    mixer, x = shaken(S5(DIM, state=8)), tokens(33)
    transition, entry = mixer.dynamics()
    write, read = entry[:, None] * torch.view_as_complex(mixer.write), torch.view_as_complex(mixer.read)
    y = mixer.D * x
    for source in range(DIM):
        filters = kernel(transition.expand(DIM, -1), read * write[:, source], 33)
        y = y + fft_conv(x[..., source : source + 1].expand(-1, -1, DIM), filters)
    g = gelu(y)
    assert_close(mixer(x), g * torch.sigmoid(mixer.to_gate(g)))


@pytest.mark.paper("H3", "definition")
@pytest.mark.parametrize("head_dim", [1, 4])
def test_h3_compares_remembered_keys_with_queries(head_dim: int) -> None:
    mixer, x = H3(DIM, head_dim=head_dim, state=6, shift=5).double(), tokens(21).requires_grad_()
    heads = DIM // head_dim

    def formula() -> Tensor:
        k = mixer.to_k(x)
        shifted = torch.zeros_like(k)
        for age in range(5):
            shifted[:, age:] += mixer.shift[:, 4 - age] * k[:, : 21 - age]
        q, k, v = (each.unflatten(-1, (heads, head_dim)) for each in (mixer.to_q(x), shifted, mixer.to_v(x)))
        out = torch.zeros_like(q)
        for i in range(head_dim):
            for j in range(head_dim):
                out[..., j] += q[..., i] * diagonal(mixer.ssm, k[..., i] * v[..., j], trapezoidal)
        return mixer.to_out(out.flatten(2))

    follows(mixer, lambda: mixer(x), formula, x)


@pytest.mark.paper("H3", "definition")
def test_h3_starts_as_its_authors_start_it() -> None:
    """S4D-Lin, steps from a thousandth to a tenth, taps as of a convolution but for the newest key's."""
    mixer = H3(512)
    assert mixer.ssm.dynamics.log_step.shape == (512,)  # heads of one channel
    expected = torch.complex(torch.full((32,), -0.5), torch.pi * torch.arange(32.0))
    assert_close(rates_of(mixer.ssm.dynamics), expected.expand(512, 32))
    step, older, newest = mixer.ssm.dynamics.log_step.exp(), mixer.shift[:, :-1], mixer.shift[:, -1]
    assert step.min() > 0.99e-3 and step.max() < 0.101 and step.min() < 2e-3 and step.max() > 0.05
    assert mixer.shift.shape == (512, 64) and older.abs().max() <= 1 / 8
    assert 0.9 < older.std() * 8 * 3**0.5 < 1.1
    for parameter, std in ((newest, 1.0), (mixer.ssm.D, 1.0), (mixer.ssm.read, 0.5**0.5)):
        assert 0.8 < parameter.std() / std < 1.2


def mixers(**options: Any) -> list[Any]:
    return [S4D(DIM, state=8, **options), H3(DIM, head_dim=4, state=6, shift=5, **options)]


@pytest.mark.paper("H3", "works_when")
def test_state_passing_in_chunks_equals_one_transform() -> None:
    x = tokens(50)
    for whole, pieces in zip(mixers(), mixers(chunk=7), strict=True):
        shaken(whole)
        pieces.double().load_state_dict(whole.state_dict())
        assert_close(pieces(x), whole(x))
        with forced_impl("reference"):
            assert_close(whole(x), pieces(x))


def test_no_token_reaches_an_earlier_output() -> None:
    x = tokens(50).requires_grad_()
    for mixer in map(shaken, mixers()):
        (gradient,) = torch.autograd.grad(mixer(x)[:, :30].square().sum(), x)
        assert gradient[:, 30:].abs().max() < 1e-12 * gradient.abs().max()


@pytest.mark.paper("H3", "works_when")
def test_decoding_keeps_a_state_of_constant_size() -> None:
    for mixer in [*map(shaken, mixers()), shaken(S5(DIM, state=8))]:
        x, state = tokens(30), mixer.init_state(2)
        size = sum(each.nbytes for each in state)
        outs = []
        for token in x.split(1, dim=1):
            out, state = mixer.decode(token, state)
            outs.append(out)
        assert_close(torch.cat(outs, 1), mixer(x))
        assert sum(each.nbytes for each in state) == size == 2 * mixer.state_bytes(30)


def test_documents_start_afresh() -> None:
    for mixer in [*map(shaken, mixers()), shaken(S5(DIM, state=8))]:
        x, lengths = tokens(30), [4, 0, 19, 7]
        expected = torch.cat([mixer(piece) for piece in x.split(lengths, 1)], 1)
        assert_close(mixer(x, layout=Packed(lengths)), expected)


class Recall(nn.Module):
    """Two H3 layers over letters."""

    def __init__(self, letters: int, dim: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(letters, dim), nn.Linear(dim, letters)
        self.layers = nn.ModuleList(H3(dim, head_dim=4, state=16, shift=4) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed(text)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return self.head(x)


def pairs_and_question(batch: int, pairs: int = 3, keys: int = 4) -> tuple[Tensor, Tensor]:
    """Pairs of a key and a value, a key again, and its value: (B, 2 pairs + 1) and (B,)."""
    order = torch.rand(batch, keys).argsort(1)[:, :pairs]
    values = keys + torch.randint(keys, (batch, pairs))
    asked = torch.randint(pairs, (batch, 1))
    text = torch.cat([torch.stack([order, values], 2).flatten(1), order.gather(1, asked)], dim=1)
    return text, values.gather(1, asked).squeeze(1)


def induction(batch: int, length: int = 9) -> tuple[Tensor, Tensor]:
    """Letters with one trigger among them, the trigger again, and what followed it: (B, N) and (B,)."""
    text = torch.randint(7, (batch, length))
    place, at = torch.randint(length - 2, (batch, 1)), torch.arange(batch)
    text[at, place.squeeze(1)] = text[:, -1] = 7
    return text, text.gather(1, place + 1).squeeze(1)


@pytest.mark.paper("H3", "works_when")
@pytest.mark.parametrize("task", [pairs_and_question, induction])
def test_h3_learns_to_recall(task: Callable[[int], tuple[Tensor, Tensor]]) -> None:
    model = Recall(letters=8, dim=24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        text, answer = task(64)
        loss = nn.functional.cross_entropy(model(text)[:, -1], answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    text, answer = task(500)
    assert (model(text)[:, -1].argmax(-1) == answer).float().mean() > 0.9  # guessing gives a third


def test_refusals_say_what_to_do() -> None:
    x, given = torch.randn(1, 9, 3), [each.to(torch.complex64) for each in coefficients()]
    wrongs: list[tuple[str, Any]] = [
        ("transition is complex", lambda: evolve(x, given[0].real, *given[1:])),
        ("write is complex", lambda: evolve(x, given[0], given[1][:2], given[2])),
        ("x is real", lambda: evolve(x[0], *given)),
        ("at least 1", lambda: evolve(x, *given, chunk=0)),
        ("add up to N", lambda: evolve(x, *given, lengths=[3, 3])),
        ("start afresh", lambda: evolve(x, *given, lengths=[9], state=torch.zeros(1, 3, 5) + 0j)),
        ("impl is 'auto' or one of", lambda: evolve(x, *given, impl="doubling")),
        ("impl is 'auto' or one of", lambda: evolve_shared(given[1][None], given[0][0], impl="fft")),
        ("complex", lambda: evolve_shared(x, given[0][0])),
        ("bilinear", lambda: discretize(given[0], torch.ones(1), "euler")),
        ("two for each complex", lambda: S4D(8, state=3)),
        ("newest key", lambda: H3(8, shift=0)),
        ("not whole", lambda: H3(12, head_dim=8)),
    ]
    for message, wrong in wrongs:
        with pytest.raises(ValueError, match=message):
            wrong()
