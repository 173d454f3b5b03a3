"""Based, JRT-RNN, Linearized-LLM and Small-E: formulas pair by pair, prefixes, trees of drafts, texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.formulas import agree, follows
from tests.support.linear_text import DIM, HEADS, LENGTH, decoded, make, project, row_shares, shifted_sum, tokens
from torch import Tensor
from torch.nn.functional import elu, layer_norm
from torch.testing import assert_close

from foveate.mixers.base import join_heads, split_heads
from foveate.mixers.linear.based_linear import BasedLinear, taylor
from foveate.mixers.linear.jrt_rnn import JRT
from foveate.mixers.linear.linearized import LinearizedLLM, ancestry, branches
from foveate.mixers.linear.small_e import SmallE, sinusoids
from foveate.options import forced_impl
from foveate.patterns import Packed

# ---- Taylor features --------------------------------------------------------------------------------------------


def series(q: Tensor, k: Tensor) -> Tensor:
    """1 + s + s^2 / 2 of each pair."""
    s = q.shape[-1] ** -0.5 * q @ k.mT
    return 1 + s + s.square() / 2


@pytest.mark.paper("BASED", "definition")
@pytest.mark.parametrize("causal", [True, False])
def test_based_weighs_by_the_taylor_series(causal: bool) -> None:
    mixer, x = make(BasedLinear, heads=HEADS, head_dim=5, causal=causal), tokens()
    q, k, v = project(mixer, x)
    weights = series(q, k).tril() if causal else series(q, k)
    assert_close(mixer(x), mixer.to_out(join_heads(row_shares(weights) @ v)))
    assert mixer.num_features == taylor(torch.zeros(5)).shape[-1] == 1 + 5 + 15


def jrt_formula(mixer: Any, x: Tensor, prefix: int) -> Tensor:
    q, k, v = project(mixer, x)
    first = x[:, :prefix]
    k_first, v_first = split_heads(mixer.to_prefix_k(first), HEADS), split_heads(mixer.to_prefix_v(first), HEADS)
    weights = torch.cat([series(q, k).tril(), series(q, k_first)], -1)
    return mixer.to_out(join_heads(row_shares(weights) @ torch.cat([v, v_first], 2)))


@pytest.mark.paper("JRT-RNN", "definition")
@pytest.mark.paper("JRT-RNN", "works_when")
@pytest.mark.parametrize("prefix", [0, 1, 9, 70, 1000])
@pytest.mark.parametrize("impl", ["chunks", "reference", None])
@pytest.mark.parametrize("moved", [True, False])
def test_jrt_knows_its_prefix_and_reads_the_rest_causally(prefix: int, impl: str | None, moved: bool) -> None:
    mixer = make(JRT, moved=moved, heads=HEADS, head_dim=3, prefix=prefix)
    x = tokens(70).requires_grad_()
    with forced_impl(impl):
        found = mixer(x)
        agree(found, jrt_formula(mixer, x, prefix), x, mixer)


@pytest.mark.paper("JRT-RNN", "definition")
def test_jrt_has_features_of_sixteen_channels_and_a_prefix_of_1024_tokens() -> None:
    mixer = JRT(64, 4)
    assert (mixer.head_dim, mixer.value_dim, mixer.prefix) == (16, 16, 1024)
    assert mixer.to_prefix_k.weight.shape == (64, 64) and not torch.equal(mixer.to_prefix_k.weight, mixer.to_k.weight)


@pytest.mark.paper("JRT-RNN", "works_when")
@pytest.mark.parametrize("prompt", [1, 12, 30])
def test_jrt_decodes_after_any_prompt(prompt: int) -> None:
    mixer, x = make(JRT, heads=HEADS, head_dim=3, prefix=9), tokens()
    out, state = mixer.read_prompt(x[:, :prompt])
    bytes_before = state.recurrent.nbytes
    rest, state = decoded(mixer, x[:, prompt:], state)
    assert_close(torch.cat([out, rest], 1), jrt_formula(mixer, x, prompt))
    assert state.recurrent.nbytes == bytes_before == 2 * mixer.state_bytes(prompt)


@pytest.mark.paper("JRT-RNN", "works_when")
@pytest.mark.parametrize("side", ["left", "right"])
def test_jrt_reads_a_batch_of_padded_prompts(side: str) -> None:
    mixer, x, lengths = make(JRT, heads=HEADS, head_dim=3), tokens(20, batch=3), torch.tensor([20, 7, 1])
    at = torch.arange(20)
    real = at < lengths[:, None] if side == "right" else at >= 20 - lengths[:, None]
    broken = x.masked_fill(~real.unsqueeze(-1), torch.nan)
    out, state = mixer.read_prompt(broken, padding=real)
    following, _ = mixer.decode(one := tokens(1, batch=3), state)
    for row, keep in enumerate(real):
        alone = torch.cat([x[row : row + 1, keep], one[row : row + 1]], 1)
        expected = jrt_formula(mixer, alone, int(lengths[row]))
        assert_close(out[row : row + 1, keep], expected[:, :-1])
        assert_close(following[row : row + 1], expected[:, -1:])


def test_jrt_takes_a_prefix_for_each_sequence() -> None:
    mixer, x = make(JRT, heads=HEADS, head_dim=3), tokens(20)
    out = mixer.read_prompt(x, prefix=torch.tensor([5, 13])).out
    for row, prefix in enumerate((5, 13)):
        assert_close(out[row : row + 1], jrt_formula(mixer, x[row : row + 1], prefix))


def test_jrt_is_causal_behind_its_prefix() -> None:
    mixer, x = make(JRT, heads=HEADS, head_dim=3, prefix=9), tokens()
    changed = torch.cat([x[:, :20], tokens(LENGTH - 20)], 1)
    assert_close(mixer(changed)[:, :20], mixer(x)[:, :20])
    assert (mixer(changed)[:, 20:] - mixer(x)[:, 20:]).abs().min(-1).values.max() > 1e-3


def test_jrt_reads_the_prefix_of_each_document() -> None:
    mixer, x, lengths = make(JRT, heads=HEADS, head_dim=3, prefix=9), tokens(40, batch=1), [15, 0, 4, 21]
    expected = [jrt_formula(mixer, piece, 9) for piece in x.split(lengths, 1) if piece.shape[1]]
    assert_close(mixer(x, layout=Packed(lengths)), torch.cat(expected, 1))
    with pytest.raises(ValueError, match="prefix"):
        make(JRT, heads=HEADS, prefix=-1)


# ---- a local branch, and trees of drafts -------------------------------------------------------------------------

TREE = [-1, 0, 1, 0, -1, 2, 4, 5]


def path_to(token: int, parents: list[int]) -> list[int]:
    path = [token]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


@pytest.mark.paper("Linearized-LLM", "definition")
def test_linearized_attention_adds_a_convolution_of_the_values() -> None:
    mixer, x = LinearizedLLM(DIM, HEADS, width=4).double(), tokens().requires_grad_()

    def formula() -> Tensor:
        q, k, v = project(mixer, x)
        weights = row_shares(((elu(q) + 1) @ (elu(k) + 1).mT).tril())
        near = shifted_sum(mixer.local.weight.squeeze(1), join_heads(v))
        return mixer.to_out(join_heads(weights @ v) + near)

    follows(mixer, lambda: mixer(x), formula, x)


@pytest.mark.paper("Linearized-LLM", "works_when")
@pytest.mark.parametrize("prompt", [0, 2, 20])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_tree_of_drafts_is_verified_in_one_pass(prompt: int, kv_heads: int) -> None:
    mixer = make(LinearizedLLM, heads=HEADS, kv_heads=kv_heads, width=4)
    drafts = tokens(len(TREE))
    _, state = mixer.prefill(tokens(prompt), mixer.init_state(2))
    kept = state.recurrent.clone()
    out = mixer.verify(drafts, TREE, state)
    assert_close(state.recurrent, kept, rtol=0, atol=0)
    for token in range(len(TREE)):
        stepped, _ = decoded(mixer, drafts[:, path_to(token, TREE)], state)
        assert_close(out[:, token : token + 1], stepped[:, -1:])


@pytest.mark.paper("Linearized-LLM", "works_when")
def test_accepting_a_branch_goes_on_from_it() -> None:
    mixer = make(LinearizedLLM, heads=HEADS, width=4)
    prompt, drafts, following = tokens(10), tokens(len(TREE)), tokens(1)
    _, state = mixer.prefill(prompt, mixer.init_state(2))
    branch = path_to(5, TREE)
    _, state = mixer.prefill(drafts[:, branch], state)
    whole = torch.cat([prompt, drafts[:, branch], following], 1)
    assert_close(mixer.decode(following, state).out, mixer(whole)[:, -1:])


def test_a_tree_names_ancestors() -> None:
    above = ancestry(TREE)
    for token in range(len(TREE)):
        assert above[token].nonzero().flatten().tolist() == sorted(path_to(token, TREE))
    assert branches([-1, 0, 1], 2).tolist() == [[0, -1], [1, 0], [2, 1]]
    assert branches([], 2).shape == (0, 2)
    with pytest.raises(ValueError, match="earlier one"):
        ancestry([0])
    mixer = make(LinearizedLLM, heads=HEADS)
    with pytest.raises(ValueError, match="one parent"):
        mixer.verify(tokens(3), [-1, 0], mixer.init_state(2))


# ---- speech that reads a text ------------------------------------------------------------------------------------


def small_e_formula(mixer: Any, x: Tensor, text: Tensor) -> Tensor:
    said = mixer.decoder(x)
    q, k, v = mixer.to_q(mixer.norm(x + said)), mixer.to_k(text), mixer.to_v(text)
    places = sinusoids(text.shape[1], mixer.positions).double()
    seen = (DIM**-0.5 * q @ k.mT).softmax(-1) @ places
    tracked = seen + mixer.tracker(seen)
    return said + mixer.to_out((mixer.positions**-0.5 * tracked @ places.mT).softmax(-1) @ v)


def test_small_e_fetches_what_stands_at_the_positions_it_saw() -> None:
    mixer, x, text = make(SmallE, heads=HEADS, positions=8), tokens(), tokens(11)
    assert_close(mixer(x, text=text), small_e_formula(mixer, x, text))
    assert_close(mixer(x), small_e_formula(mixer, x, mixer.stand_in.expand(2, -1, -1)))
    assert_close(mixer.to_q(x), layer_norm(mixer.to_q[0](x), (DIM,), mixer.to_q[1].weight, mixer.to_q[1].bias))


def test_small_e_decodes_a_text_at_constant_memory() -> None:
    mixer, x, text = make(SmallE, heads=HEADS, positions=8), tokens(), tokens(11)
    real = torch.arange(11) < torch.tensor([[11], [6]])
    whole = mixer(x, text=text, text_padding=real)
    out, state = decoded(mixer, x, mixer.init_state(2, text=text, text_padding=real))
    assert_close(out, whole)
    assert mixer.state_bytes(10) == mixer.state_bytes(10_000)
    assert_close(whole[1:], mixer(x[1:], text=text[1:, :6]))
    assert state.text.k.shape == (2, 11, DIM)


def test_small_e_reads_no_padding_of_the_text() -> None:
    mixer, x, text = make(SmallE, heads=HEADS, positions=8), tokens(), tokens(11)
    real = torch.arange(11).expand(2, -1) < 6
    broken = text.masked_fill(~real.unsqueeze(-1), torch.nan)
    assert_close(mixer(x, text=broken, text_padding=real), mixer(x, text=text[:, :6]))


def test_small_e_learns_to_read_on() -> None:
    """Each token says what was read last; the next, of texts never seen before, stands in the text alone."""
    mixer = SmallE(DIM, HEADS, positions=16)
    optimizer = torch.optim.Adam(mixer.parameters(), lr=0.02)

    def error(text: Tensor, read: Tensor) -> Tensor:
        last = torch.cat([torch.zeros_like(text[:, :1]), text[:, :-1]], 1)
        return (mixer(last, text=read) - text).square().mean()

    for _ in range(150):
        text = torch.randn(16, 12, DIM)
        loss = error(text, text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    text = torch.randn(64, 12, DIM)
    with torch.no_grad():
        assert error(text, text) < 0.3 < 1 < error(text, text.roll(1, 0))


def test_small_e_refuses_in_words() -> None:
    mixer, x = make(SmallE, heads=HEADS), tokens()
    with pytest.raises(ValueError, match="text is"):
        mixer(x, text=tokens(11, batch=3))
    with pytest.raises(ValueError, match="text_padding"):
        mixer(x, text=tokens(11), text_padding=torch.ones(2, 11))
    with pytest.raises(ValueError, match="even width"):
        make(SmallE, heads=HEADS, positions=7)
