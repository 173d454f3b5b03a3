"""Mamba and what is made of it for long contexts, against the papers' formulas written out token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.linear_text import held
from tests.support.scan_formulas import (
    DIM,
    convolved,
    scanned,
    shaken,
    tokens,
)
from torch import Tensor
from torch.nn.functional import silu, softplus
from torch.testing import assert_close

from foveate.mixers.recurrent_ssm import memmamba
from foveate.mixers.recurrent_ssm.decimamba import DeciMamba, tokens_to_keep
from foveate.mixers.recurrent_ssm.mamba import Mamba, SelectiveScan
from foveate.mixers.recurrent_ssm.mamba2 import Mamba2
from foveate.mixers.recurrent_ssm.memmamba import MemMamba, NoteLayer
from foveate.recurrence import recur
from foveate.recurrence.selective.api import scan


def test_mamba_is_a_gated_selective_scan() -> None:
    mixer, x = shaken(Mamba(DIM, state=5)), tokens(23)
    u, gate = mixer.to_in(x).chunk(2, -1)
    expected = scanned(mixer.branch.ssm, convolved(mixer.branch.conv, u)) * silu(gate)
    assert_close(mixer(x), mixer.to_out(expected))


def test_mamba_is_masked_attention() -> None:
    mixer, x = shaken(Mamba(DIM, state=5)), tokens(23)
    u, gate = mixer.to_in(x).chunk(2, -1)
    matrix = mixer.attention_matrix(x)
    assert torch.equal(matrix, matrix.tril())
    y = (matrix @ convolved(mixer.branch.conv, u).mT.unsqueeze(-1)).squeeze(-1).mT
    assert_close(mixer.to_out(y * silu(gate)), mixer(x))


def test_its_attention_has_the_gradients_of_the_scan() -> None:
    ssm, u = shaken(SelectiveScan(6, state=3)), torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    towards = torch.randn(2, 9, 6, dtype=torch.float64)
    wanted = [u, *ssm.parameters()]
    y = (ssm.matrix(u) @ u.mT.unsqueeze(-1)).squeeze(-1).mT
    found = torch.autograd.grad((y * towards).sum(), wanted)
    assert_close(found, torch.autograd.grad((ssm(u).out * towards).sum(), wanted))


@pytest.mark.parametrize("groups", [0, 1, 2])
def test_blocks_are_those_of_transformers(groups: int) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": DIM, "state_size": 5, "num_hidden_layers": 1}
    if groups:
        heads = {"num_heads": 4, "head_dim": DIM // 2, "n_groups": groups, "chunk_size": 8}
        config = transformers.Mamba2Config(**sizes, **heads)
        mixer = shaken(Mamba2(DIM, heads=4, groups=groups, state=5)).float()
        theirs = transformers.models.mamba2.modeling_mamba2.Mamba2Mixer(config, 0)
        names = {"step_bias": "dt_bias", "scale": "norm.weight"}
    else:
        mixer = shaken(Mamba(DIM, state=5)).float()
        theirs = transformers.models.mamba.modeling_mamba.MambaMixer(transformers.MambaConfig(**sizes), 0)
        names = {"to_choices": "x_proj", "to_step": "dt_proj", "step_bias": "dt_proj.bias"}
        names |= {"branch.": "", "ssm.": ""}
    weights = {}
    for name, value in mixer.state_dict().items():
        for ours, other in {"to_in": "in_proj", "to_out": "out_proj", "conv.": "conv1d.", **names}.items():
            name = name.replace(ours, other)
        weights[name] = value
    theirs.load_state_dict(weights)
    x = tokens(23).float()
    with torch.no_grad():
        assert_close(mixer(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_linear_attention_with_a_decay_a_head(groups: int) -> None:
    mixer, x = shaken(Mamba2(DIM, heads=4, groups=groups, state=5)), tokens(23)
    inner, keys = 2 * DIM, groups * 5
    gate, mixed, steps = mixer.to_in(x).split([inner, inner + 2 * keys, 4], -1)
    v, k, q = convolved(mixer.conv, mixed).split([inner, keys, keys], -1)
    v, k, q = v.unflatten(-1, (4, -1)), k.unflatten(-1, (groups, -1)), q.unflatten(-1, (groups, -1))
    step = torch.log1p((steps + mixer.step_bias).exp())
    out = torch.zeros_like(v)
    for head in range(4):
        state, group = torch.zeros(2, 5, v.shape[-1], dtype=x.dtype), head // (4 // groups)
        for t in range(23):
            fade = torch.exp(-step[:, t, head] * mixer.A_log[head].exp()).view(2, 1, 1)
            update = k[:, t, group, :, None] * v[:, t, None, head] * step[:, t, head].view(2, 1, 1)
            state = fade * state + update
            out[:, t, head] = (q[:, t, group, None] @ state)[:, 0] + mixer.D[head] * v[:, t, head]
    y = (out.flatten(2) * silu(gate)).unflatten(-1, (groups, -1))
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close(mixer(x), mixer.to_out(y.flatten(2) * mixer.scale))


def test_mamba2_is_masked_attention() -> None:
    mixer, x = shaken(Mamba2(DIM, heads=4, groups=2, state=5)), tokens(23)
    gate, mixed, _ = mixer.projected(x)
    matrix = mixer.attention_matrix(x)
    assert torch.equal(matrix, matrix.tril())
    v = convolved(mixer.conv, mixed)[..., : 2 * DIM].unflatten(-1, (4, -1)).transpose(1, 2)
    y = (matrix @ v).transpose(1, 2).flatten(2)
    assert_close(mixer.to_out(mixer.normed(y * silu(gate))), mixer(x))


def test_scan_and_recur_agree_on_one_decay_a_head() -> None:
    heads, dim, states, length = 3, 4, 5, 41
    x = torch.randn(2, length, heads * dim, dtype=torch.float64)
    step, rate = torch.rand(2, length, heads).double(), torch.rand(heads).double()
    write, read = torch.randn(2, 2, length, states, dtype=torch.float64)
    start = torch.randn(2, heads * dim, states, dtype=torch.float64)

    per_channel = rate.repeat_interleave(dim)[:, None].expand(-1, states)
    selective = scan(x, step.repeat_interleave(dim, -1), -per_channel, write, read, state=start)

    values = (x.unflatten(-1, (heads, dim)) * step.unsqueeze(-1)).transpose(1, 2)
    queries = read.unsqueeze(1).expand(-1, heads, -1, -1)
    decay = -(step * rate).transpose(1, 2)
    state = start.unflatten(1, (heads, dim)).mT
    linear = recur(queries, write.unsqueeze(1), values, decay=decay, scale=1.0, state=state)

    assert_close(linear.out.transpose(1, 2).flatten(2), selective.out)
    assert_close(linear.state.mT.flatten(1, 2), selective.state)


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
def test_steps_start_where_the_paper_starts_them(kind: Any) -> None:
    mixer = kind(512, **({"heads": 512} if kind is Mamba2 else {}))
    ssm = mixer if kind is Mamba2 else mixer.branch.ssm
    step = softplus(ssm.step_bias)
    assert step.min() > 0.00099 and step.max() < 0.101
    assert step.log().std().item() == pytest.approx(4.605 / 12**0.5, rel=0.2)


def test_a_hidden_token_neither_writes_nor_fades() -> None:
    ssm, u = shaken(SelectiveScan(6, state=3)), torch.randn(1, 30, 6, dtype=torch.float64)
    real = torch.rand(1, 30) < 0.6
    assert_close(ssm(u, key_mask=real).out[real], ssm(u[real].unsqueeze(0)).out[0])


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
def test_half_precision_states_are_float32(kind: Any) -> None:
    mixer = kind(16).bfloat16()
    out, state = mixer.prefill(torch.randn(2, 9, 16).bfloat16(), mixer.init_state(2))
    assert out.dtype == state.tail.dtype == torch.bfloat16
    assert state[0].dtype == torch.float32


# ---- DeciMamba -----------------------------------------------------------------------------------------


def decimated(keep: int, mamba: Mamba, last: int = 1) -> DeciMamba:
    mixer = DeciMamba(DIM, keep=keep, last=last, state=5).double()
    mixer.load_state_dict(mamba.state_dict())
    return mixer


def most_important(ssm: SelectiveScan, u: Tensor, count: int) -> list[int]:
    """The first ``count`` of the tokens u (N, C), those of the greatest mean step first."""
    importance = softplus(ssm.to_step(ssm.to_choices(u)[..., : ssm.rank]) + ssm.step_bias).mean(-1)
    return sorted(range(count), key=lambda t: -importance[t].item())


@pytest.mark.paper("DeciMamba", "definition")
def test_decimamba_scans_the_tokens_with_the_greatest_steps_in_order() -> None:
    mamba, x = shaken(Mamba(DIM, state=5)), tokens(40)
    mixer = decimated(11, mamba, last=2)
    u, gate = mamba.to_in(x).chunk(2, -1)
    u = convolved(mamba.branch.conv, u)
    expected = torch.zeros_like(x)
    for row in range(2):
        best = most_important(mamba.branch.ssm, u[row], 38)[:9]
        kept = torch.tensor([*sorted(best), 38, 39])
        y = scanned(mamba.branch.ssm, u[row, kept].unsqueeze(0)) * silu(gate[row, kept])
        expected[row, kept] = mamba.to_out(y)[0]
    assert_close(mixer(x), expected)
    short = mixer.decimate(x)
    assert short.out.shape == (2, 11, DIM)
    assert bool((short.kept[:, 1:] > short.kept[:, :-1]).all())
    assert_close(short.out, expected.gather(1, short.kept.unsqueeze(-1).expand(-1, -1, DIM)))


def test_decimamba_that_keeps_all_is_mamba() -> None:
    mamba, x = shaken(Mamba(DIM, state=5)), tokens(20)
    assert_close(decimated(20, mamba)(x), mamba(x))
    assert_close(decimated(20, mamba).decimate(x).out, mamba(x))


def test_decoding_goes_on_from_a_decimated_prompt() -> None:
    mamba, x = shaken(Mamba(DIM, state=5)), tokens(40)
    mixer = decimated(9, mamba)
    outs, state = [], mixer.prefill(x[:, :35]).state
    for t in range(35, 40):
        out, state = mixer.decode(x[:, t : t + 1], state)
        outs.append(out)
    u, gate = mamba.to_in(x).chunk(2, -1)
    u = convolved(mamba.branch.conv, u)  # of all tokens: only the scan is decimated
    for row in range(2):
        best = most_important(mamba.branch.ssm, u[row], 34)[:8]
        seen = torch.tensor([*sorted(best), *range(34, 40)])
        y = scanned(mamba.branch.ssm, u[row, seen].unsqueeze(0))[:, -5:] * silu(gate[row, 35:])
        assert_close(torch.cat(outs, 1)[row], mamba.to_out(y)[0])
    with pytest.raises(NotImplementedError, match="does not decode"):
        mixer.init_state(1)


def test_deeper_layers_of_a_decimated_stack_are_shorter() -> None:
    x, keeps = tokens(64), tokens_to_keep(3, 32, fade=0.5, least=10)
    assert keeps == [32, 16, 10]
    for keep in keeps:
        out, kept, _ = decimated(keep, shaken(Mamba(DIM, state=5))).decimate(x)
        x = x.gather(1, kept.unsqueeze(-1).expand(-1, -1, DIM)) + out
    assert x.shape == (2, 10, DIM)


# ---- MemMamba ------------------------------------------------------------------------------------------


def asked(query: Tensor, notes: list[Tensor]) -> Tensor:
    """Attention of one query (D,) to a list of notes (D,)."""
    if not notes:
        return torch.zeros_like(query)
    pool = torch.stack(notes)
    return (pool @ query / len(query) ** 0.5).softmax(0) @ pool


@pytest.mark.parametrize("block", [7, 1024])
def test_memmamba_reads_pools_of_notes(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memmamba, "BLOCK", block)
    mixer = shaken(MemMamba(DIM, depth=3, every=2, slots=4, width=5, expand=1, state=3))
    x = tokens(30, batch=2)
    for row in range(2):
        assert_close(mixer(x)[row], by_hand(mixer, x[row]), msg=f"sequence {row}")


def by_hand(mixer: MemMamba, x: Tensor) -> Tensor:
    """Token by token with lists of notes, the newest ``slots`` of which are kept."""
    h, pools_of_layers = x, []
    for depth, layer in enumerate(mixer.layers):
        assert isinstance(layer, NoteLayer)
        normed = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
        y = layer.mamba(normed.unsqueeze(0))[0]
        notes, pools, outs, fear = [], [], [], torch.zeros(1, dtype=x.dtype)
        for t, token in enumerate(normed):
            pools.append(notes[-4:])
            query = layer.to_query(token)
            out = y[t]
            if fear > 0.5:
                out = out + layer.from_tokens(fear * asked(query, pools[t]))
            if depth % 2 == 1:
                seen = [note for older in [*pools_of_layers, pools] for note in older[t]]
                out = out + layer.from_layers(asked(query, seen))
            importance = torch.sigmoid(layer.to_importance(token))
            if importance > 0.5:
                notes.append(importance * layer.to_note(token))
            fear = torch.sigmoid(layer.to_fear(y[t]))
            outs.append(out)
        pools_of_layers.append(pools)
        h = h + torch.stack(outs)
    return h - x


def test_the_pool_has_a_fixed_size() -> None:
    mixer = MemMamba(16, slots=6, width=4)
    _, early = mixer.prefill(torch.randn(2, 10, 16), mixer.init_state(2))
    _, state = mixer.prefill(torch.randn(2, 50, 16), mixer.init_state(2))
    assert held(state) == held(early)
    assert state[0].notes.pool.shape == (2, 6, 4)
    assert int(state[0].notes.filled.max()) <= 6


def test_a_note_outlives_what_the_scan_has_forgotten() -> None:
    mixer = shaken(MemMamba(DIM, depth=1, every=1, slots=3, width=5, expand=1, state=3, threshold=0.9))
    layer = mixer.layers[0]
    assert isinstance(layer, NoteLayer)
    layer.mamba.branch.ssm.step_bias.data.fill_(9.0)  # steps so long that the state forgets at once
    layer.to_importance.weight.data.zero_()
    layer.to_importance.weight.data[0, 0] = 50.0
    layer.to_importance.bias.data.fill_(-20.0)
    x = tokens(60)
    x[:, :, 0] = 0.0
    x[:, 5, 0] = 5.0  # the one token worth a note
    changed = x.clone()
    changed[:, 5, 1:] += 1.0
    with torch.no_grad():
        assert (mixer(changed) - mixer(x))[:, 50:].abs().max() > 1e-4
        assert (layer.mamba(changed) - layer.mamba(x))[:, 50:].abs().max() < 1e-9


def test_refusals_say_what_to_do() -> None:
    wrongs: list[tuple[str, Any]] = [
        ("at least one number", lambda: Mamba(8, state=0)),
        ("at least one token", lambda: Mamba(8, conv=0)),
        ("at least once", lambda: Mamba(8, expand=0)),
        ("no noncausal form", lambda: Mamba(8, causal=False)),
        ("whole numbers of heads", lambda: Mamba2(8, heads=4, groups=3)),
        ("heads must divide", lambda: Mamba2(8, heads=3)),
        ("at least 1", lambda: DeciMamba(8, keep=0)),
        ("last tokens", lambda: DeciMamba(8, keep=2, last=3)),
        ("share of tokens", lambda: tokens_to_keep(3, 10, fade=0)),
        ("at least 1", lambda: MemMamba(8, slots=0)),
    ]
    for message, wrong in wrongs:
        with pytest.raises(ValueError, match=message):
            wrong()
