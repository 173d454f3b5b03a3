"""What foveate.compat.fla's functions do besides, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.support.compat_inputs import CASES, FIXED, chosen, draw, plain, states_for, with_option
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from foveate.compat import fla
from foveate.compat.fla import chunk_gated_delta_rule, chunk_kda, fused_recurrent_gated_delta_rule


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", with_option("use_qk_l2norm_in_kernel"))
def test_queries_and_keys_can_be_made_unit(name: str) -> None:
    drawn = draw()
    drawn["k"] = 3 * drawn["k"]
    call = chosen(drawn, CASES[name][0])
    made = {x: drawn[x] / (drawn[x].square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in ("q", "k")}
    got = getattr(fla, name)(**call, use_qk_l2norm_in_kernel=True)[0]
    assert_close(got, getattr(fla, name)(**call | made)[0])


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("function", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule])
def test_gated_delta_gates_can_be_made_inside(function: Callable[..., Any], negative: bool) -> None:
    drawn = draw(share=2)
    raw, logits = torch.randn_like(drawn["g"]), torch.randn_like(drawn["beta"])
    A_log, bias = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    q, k, v = (drawn[name] for name in "qkv")
    got = function(
        q, k, v, raw, beta=logits, use_gate_in_kernel=True, A_log=A_log, dt_bias=bias,
        use_beta_sigmoid_in_kernel=True, allow_neg_eigval=negative,
    )[0]  # fmt: skip
    beta = logits.sigmoid() * (2 if negative else 1)
    assert_close(got, function(q, k, v, -A_log.exp() * softplus(raw + bias), beta=beta)[0])


def test_gk_and_g_of_the_gated_delta_rule_add_up() -> None:
    drawn = draw()
    q, k, v, g, gk = (drawn[name] for name in ("q", "k", "v", "g", "gk"))
    got = fused_recurrent_gated_delta_rule(q, k, v, g, gk, beta=drawn["beta"])[0]
    assert_close(got, chunk_kda(q, k, v, gk + g.unsqueeze(-1), drawn["beta"])[0])


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_kda_gates_can_be_made_inside(name: str, bounded: bool) -> None:
    drawn, function = draw(), getattr(fla, name)
    raw, logits = torch.randn_like(drawn["gk"]), torch.randn_like(drawn["beta"])
    A_log, bias = torch.randn(3, dtype=torch.float64), torch.randn(15, dtype=torch.float64)
    q, k, v = (drawn[x] for x in "qkv")
    shifted, rate = raw + bias.view(3, 5), A_log.exp().view(3, 1)
    g = -4 * (rate * shifted).sigmoid() if bounded else -rate * softplus(shifted)
    got = function(
        q, k, v, raw, logits, use_gate_in_kernel=True, A_log=A_log, dt_bias=bias,
        use_beta_sigmoid_in_kernel=True, lower_bound=-4.0 if bounded else None,
    )[0]  # fmt: skip
    assert_close(got, function(q, k, v, g, logits.sigmoid())[0])
    if bounded:
        without = function(q, k, v, raw, drawn["beta"], use_gate_in_kernel=True, lower_bound=-4.0)[0]
        assert_close(without, function(q, k, v, -4 * raw.sigmoid(), drawn["beta"])[0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES if "linear_attn" in name])
def test_normalized_linear_attention_divides_by_the_keys_so_far(name: str, packed: bool) -> None:
    drawn = {key: x.abs() for key, x in draw(batch=1 if packed else 2).items()}
    q, k, v = (drawn[x] for x in "qkv")
    offsets = [0, 4, 4, 19, 37] if packed else None
    count = 4 if packed else 2
    states, z = states_for(drawn, count).abs(), torch.rand(count, 1, 3, 5, dtype=torch.float64)
    out, last = plain(q, k, v, 0.3, states, offsets)
    below, last_z = plain(q, k, torch.ones_like(v[..., :1]), 0.3, z.squeeze(1).unsqueeze(-1), offsets)
    more = {} if offsets is None else {"cu_seqlens": torch.tensor(offsets)}
    o, (state, z_state) = getattr(fla, name)(
        q, k, v, 0.3, initial_state=(states, z), output_final_state=True, normalize=True, **more
    )
    assert_close(o, out / (below + 1e-10))
    assert_close(state, last)
    assert_close(z_state, last_z.squeeze(-1).unsqueeze(1))
    only = getattr(fla, name)(q, k, v, 0.3, initial_state=states, normalize=True, **more)
    zeros = getattr(fla, name)(q, k, v, 0.3, initial_state=(states, 0 * z), normalize=True, **more)
    assert torch.equal(only[0], zeros[0]) and only[1] is None


def test_the_fused_form_of_rwkv7_makes_a_and_b_itself() -> None:
    drawn = draw()
    q, k, v, w, kk = (drawn[name] for name in ("q", "k", "v", "gk", "a"))
    rate = torch.rand_like(kk)
    got = fla.fused_mul_recurrent_rwkv7(q, w, k, v, kk, rate)[0]
    assert_close(got, fla.chunk_rwkv7(q, w, k, v, -kk, kk * rate)[0])


@pytest.mark.parametrize("packed", [False, True])
def test_hgrn_is_a_scan(packed: bool) -> None:
    offsets = [0, 4, 4, 11, 20] if packed else None
    x, states = (
        torch.randn(shape, dtype=torch.float64) for shape in ((1 if packed else 2, 20, 5), (4 if packed else 2, 5))
    )
    g = logsigmoid(torch.randn_like(x))
    stretches = [(0, a, b) for a, b in pairwise(offsets)] if offsets else [(0, 0, 20), (1, 0, 20)]
    wanted, last = torch.empty_like(x), []
    for (b, start, end), state in zip(stretches, states, strict=True):
        for t in range(start, end):
            state = g[b, t].exp() * state + x[b, t]
            wanted[b, t] = state
        last.append(state)
    more = {} if offsets is None else {"cu_seqlens": torch.tensor(offsets)}
    o, final = fla.fused_recurrent_hgrn(x, g, states, output_final_state=True, **more)
    assert_close(o, wanted)
    assert_close(final, torch.stack(last))
    assert fla.chunk_hgrn(x, g)[1] is None


# ---- deprecated arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", with_option("transpose_state_layout"))
def test_the_old_name_of_state_v_first_warns(name: str) -> None:
    drawn = draw()
    states = states_for(drawn, 2)
    call = {**chosen(drawn, CASES[name][0]), "output_final_state": True, "initial_state": states.mT.contiguous()}
    wanted = getattr(fla, name)(**call, state_v_first=True)
    with pytest.warns(DeprecationWarning, match="state_v_first") as caught:
        got = getattr(fla, name)(**call, transpose_state_layout=True)
    assert [warning.filename for warning in caught] == [__file__]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", with_option("head_first"))
def test_head_first_warns_and_is_refused(name: str) -> None:
    drawn = draw()
    call = chosen(drawn, CASES[name][0]) | FIXED.get(name, {})
    with pytest.warns(DeprecationWarning, match=r"head_first.*\[B, T, H, D\]") as caught:
        got = getattr(fla, name)(**call, head_first=False)
    assert [warning.filename for warning in caught] == [__file__]
    assert torch.equal(got[0], getattr(fla, name)(**call)[0])
    with pytest.raises(NotImplementedError, match="transpose"):
        getattr(fla, name)(**call, head_first=True)


# ---- refusals --------------------------------------------------------------------------------------------------

Q, TWO, WHOLE = torch.randn(1, 12, 2, 4), torch.randn(2, 12, 2, 4), torch.tensor([0, 12])
TOKEN, CHANNEL = -torch.rand(1, 12, 2), -torch.rand(1, 12, 2, 4)
BOTH_NAMES = {"state_v_first": True, "transpose_state_layout": False}
REFUSED: list[tuple[str, Callable[[], Any], type[Exception]]] = [
    ("gv", lambda: fla.fused_recurrent_gla(Q, Q, Q, gv=CHANNEL), NotImplementedError),
    ("gv", lambda: fla.fused_recurrent_gdn(Q, Q, Q, gv=CHANNEL), NotImplementedError),
    ("head_first.*transpose", lambda: fla.chunk_gla(Q, Q, Q, CHANNEL, head_first=True), NotImplementedError),
    ("no weights", lambda: fla.parallel_retention(Q, Q, Q, output_attentions=True), NotImplementedError),
    ("cp_context", lambda: fla.chunk_gdn(Q, Q, Q, TOKEN, -TOKEN, cp_context=object()), NotImplementedError),
    ("use_graph", lambda: fla.chunk_kda(Q, Q, Q, CHANNEL, -TOKEN, use_graph=True), NotImplementedError),
    (
        "only the last state",
        lambda: fla.chunk_kda(Q, Q, Q, CHANNEL, -TOKEN, return_intermediate_states=True),
        NotImplementedError,
    ),
    ("one number a token", lambda: fla.fused_recurrent_delta_rule(Q, Q, Q, -CHANNEL), NotImplementedError),
    ("unexpected keyword", lambda: fla.chunk_gla(Q, Q, Q, CHANNEL, chunk=3), TypeError),
    (r"g must be .*\[B, T, H, D\]", lambda: fla.chunk_gdn(Q, Q, Q, TOKEN.mT, -TOKEN), ValueError),
    (r"beta must be", lambda: fla.chunk_delta_rule(Q, Q, Q, -TOKEN.mT), ValueError),
    (r"one shape \[B, T, H, K\]", lambda: fla.chunk_retention(Q, Q[:, :, :1], Q), ValueError),
    (r"v \[B, T, HV, V\]", lambda: fla.chunk_retention(Q, Q, Q.transpose(1, 2)), ValueError),
    ("multiple of those of q", lambda: fla.chunk_retention(Q, Q, Q[:, :, :1]), ValueError),
    (r"u must be \(2, 4\)", lambda: fla.chunk_rwkv6(Q, Q, Q, CHANNEL, torch.randn(4, 2)), ValueError),
    (r"g must be \(1, 12, 2\)", lambda: fla.chunk_simple_gla(Q, Q, Q, CHANNEL), ValueError),
    (r"w must be \(1, 12, 2, 4\)", lambda: fla.chunk_rwkv6(Q, Q, Q, TOKEN, Q[0, 0]), ValueError),
    ("both say", lambda: fla.chunk_simple_gla(Q, Q, Q, TOKEN, TOKEN[0, 0]), ValueError),
    (r"\[N, H, K, V\]", lambda: fla.chunk_retention(Q, Q, Q, initial_state=torch.zeros(1, 2, 4, 5)), ValueError),
    ("batch of 1", lambda: fla.chunk_retention(TWO, TWO, TWO, cu_seqlens=WHOLE), ValueError),
    ("rise from 0 to the 12", lambda: fla.chunk_retention(Q, Q, Q, cu_seqlens=torch.tensor([0, 7])), ValueError),
    ("whole numbers", lambda: fla.chunk_retention(Q, Q, Q, cu_seqlens=WHOLE.float()), TypeError),
    ("pass cu_seqlens as well", lambda: fla.chunk_gla(Q, Q, Q, CHANNEL, cu_seqlens_cpu=WHOLE), ValueError),
    ("two names", lambda: fla.chunk_rwkv7(Q, CHANNEL, Q, Q, Q, Q, log_w=CHANNEL), ValueError),
    ("missing k, v", lambda: fla.chunk_rwkv7(Q, CHANNEL, a=Q, b=Q), TypeError),
    ("pass A_log", lambda: fla.chunk_gdn(Q, Q, Q, TOKEN, -TOKEN, use_gate_in_kernel=True), ValueError),
    ("or lower_bound", lambda: fla.chunk_kda(Q, Q, Q, CHANNEL, -TOKEN, use_gate_in_kernel=True), ValueError),
    ("use_beta_sigmoid", lambda: fla.chunk_gdn(Q, Q, Q, TOKEN, -TOKEN, allow_neg_eigval=True), ValueError),
    ("layer_idx counts", lambda: fla.chunk_lightning_attn(Q, Q, Q, layer_idx=7, num_layers=7), ValueError),
    ("S alone", lambda: fla.chunk_linear_attn(Q, Q, Q, initial_state=(Q, Q), normalize=False), ValueError),
    ("rise from 0 to the 12", lambda: fla.chunk_retention(Q, Q, Q, cu_seqlens=[0]), ValueError),
    ("whole numbers", lambda: fla.chunk_retention(Q, Q, Q, cu_seqlens=torch.tensor([[0, 12]])), TypeError),
    ("whole numbers", lambda: fla.chunk_retention(Q, Q, Q, cu_seqlens=WHOLE.bool()), TypeError),
    ("at least one head", lambda: fla.chunk_retention(Q[:, :, :0], Q[:, :, :0], Q[:, :, :0]), ValueError),
    ("only one of them", lambda: fla.fused_recurrent_gla(Q, Q, Q, **BOTH_NAMES), ValueError),
]  # fmt: skip


@pytest.mark.parametrize(("words", "call", "kind"), REFUSED, ids=[words for words, *_ in REFUSED])
def test_what_cannot_be_honoured_is_refused_in_words(words: str, call: Callable[[], Any], kind: type) -> None:
    with pytest.raises(kind, match=words):
        call()
