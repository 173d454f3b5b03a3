"""foveate.compat.fla's other recurrences are their formulas, in float64 and token by token."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, softplus

from foveate.compat import fla

Drawn = dict[str, Any]
OFFSETS = [0, 4, 4, 11, 19]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


def assert_same(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def stretches(batch: int, length: int, offsets: list[int] | None) -> list[tuple[int, int, int]]:
    if offsets is None:
        return [(b, 0, length) for b in range(batch)]
    return [(0, start, end) for start, end in pairwise(offsets)]


# ---- states written by loops -----------------------------------------------------------------------------------

STEPS = 3


def states_draw(share: int = 1, batch: int = 2, length: int = 19) -> Drawn:
    heads, dim, dim_v = 3, 5, 4
    return {
        "q": normal(batch, length, heads, dim),
        "k": normalize(normal(batch, length, heads, dim), dim=-1),
        "p": normalize(normal(batch, length, heads, dim), dim=-1) / 2,
        "v": normal(batch, length, heads * share, dim_v),
        "g": logsigmoid(normal(batch, length, heads * share)),
        "gk": logsigmoid(normal(batch, length, heads * share, dim)),
        "beta": 2 * uniform(batch, length, heads * share),
        "b": uniform(batch, length, heads * share, dim),
        "w": uniform(batch, length, heads * share, dim_v),
        "ks": normalize(normal(batch, length * STEPS, heads, dim), dim=-1),
        "vs": normal(batch, length * STEPS, heads * share, dim_v),
        "betas": 2 * uniform(batch, length * STEPS, heads * share),
    }


def comba_token(d: Drawn, b: int, t: int, h: int, group: int, state: Tensor) -> Tensor:
    state = d["g"][b, t, h].exp() * state
    error = d["v"][b, t, h] - d["p"][b, t, group] @ state
    return state + d["beta"][b, t, h] * d["k"][b, t, group].outer(error)


def gdn2_token(d: Drawn, b: int, t: int, h: int, group: int, state: Tensor) -> Tensor:
    state = d["gk"][b, t, h].exp()[:, None] * state
    key = d["k"][b, t, group]
    return state + key.outer(d["w"][b, t, h] * d["v"][b, t, h] - (d["b"][b, t, h] * key) @ state)


def product_token(d: Drawn, b: int, t: int, h: int, group: int, state: Tensor) -> Tensor:
    state = d["g"][b, t, h].exp() * state
    for step in range(t * STEPS, (t + 1) * STEPS):
        key = d["ks"][b, step, group]
        state = state + d["betas"][b, step, h] * key.outer(d["vs"][b, step, h] - key @ state)
    return state


def lightnet_token(d: Drawn, b: int, t: int, h: int, group: int, state: Tensor) -> Tensor:
    """With the exponentials as they are: the state is divided by their sum when it is read."""
    return state + d["logits"][b, t, group].exp().outer(d["v"][b, t, h])


Token = Callable[[Drawn, int, int, int, int, Tensor], Tensor]


def plain(
    token: Token, d: Drawn, states: Tensor, scale: float, offsets: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    batch, length, groups, _ = d["q"].shape
    heads, outs, last = d["v"].shape[2], {}, []
    for number, (b, start, end) in enumerate(stretches(batch, length, offsets)):
        for h in range(heads):
            state = states[number, h]
            for t in range(start, end):
                group = h // (heads // groups)
                state = token(d, b, t, h, group, state)
                outs[b, t, h] = scale * d["q"][b, t, group] @ state
            last.append(state)
    rows = [[torch.stack([outs[b, t, h] for h in range(heads)]) for t in range(length)] for b in range(batch)]
    return torch.stack([torch.stack(row) for row in rows]), torch.stack(last).unflatten(0, (-1, heads))


CALLS: dict[str, tuple[Token, str]] = {
    "chunk_comba": (comba_token, "q k v p g beta"),
    "fused_recurrent_comba": (comba_token, "q k p v g beta"),
    "chunk_gdn2": (gdn2_token, "q k v g:gk b w"),
    "fused_recurrent_gdn2": (gdn2_token, "q k v g:gk b w"),
    "chunk_gated_delta_product": (product_token, "q k:ks v:vs g beta:betas"),
}
FIXED: dict[str, Drawn] = {"chunk_gated_delta_product": {"num_householder": STEPS}}


def chosen(d: Drawn, words: str) -> Drawn:
    pairs = (word.partition(":")[::2] for word in words.split())
    return {name: d[source or name] for name, source in pairs}


def by_place(name: str, d: Drawn) -> list[Tensor]:
    """Their order of arguments, so that a door that swaps two is noticed."""
    return list(chosen(d, CALLS[name][1]).values())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("name", CALLS)
def test_outputs_states_and_gradients_are_those_of_a_loop(name: str, share: int, packed: bool) -> None:
    d = {key: x.requires_grad_() for key, x in states_draw(share, 1 if packed else 2).items()}
    offsets = OFFSETS if packed else None
    states = normal(4 if packed else 2, 3 * share, 5, 4).requires_grad_()
    dtype = random.choice([torch.int32, torch.int64, torch.uint8])
    more: Drawn = {"cu_seqlens": torch.tensor(offsets, dtype=dtype)} if offsets else {}
    got = getattr(fla, name)(
        *by_place(name, d), **FIXED.get(name, {}), **more, scale=0.3, initial_state=states, output_final_state=True
    )
    wanted = plain(CALLS[name][0], d, states, 0.3, offsets)
    assert_same(got, wanted)
    leaves = [*by_place(name, d), states]
    cotangents = [torch.randn_like(x) for x in wanted]
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, cotangents), torch.autograd.grad(wanted, leaves, cotangents), strict=True
    ):
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", CALLS)
def test_defaults_and_half_precision(name: str) -> None:
    """Scale 1 / sqrt(K), no state unless asked for; half precision in and out, float32 states."""
    d = {key: x.to(random.choice([torch.bfloat16, torch.float16])) for key, x in states_draw().items()}
    one = d["q"].dtype
    d = {key: x.to(one) for key, x in d.items()}
    call = getattr(fla, name)
    o, state = call(*by_place(name, d), **FIXED.get(name, {}))
    wanted, last = plain(
        CALLS[name][0], {k: x.double() for k, x in d.items()}, torch.zeros(2, 3, 5, 4).double(), 5**-0.5
    )
    assert o.dtype == one and state is None
    assert (o.double() - wanted).norm() < 0.02 * wanted.norm()
    _, state = call(*by_place(name, d), **FIXED.get(name, {}), output_final_state=True)
    assert state.dtype == torch.float32
    assert (state.double() - last).norm() < 0.02 * last.norm()


@pytest.mark.parametrize("name", CALLS)
def test_queries_and_keys_can_be_made_unit(name: str) -> None:
    d = states_draw()
    made = {x: d[x] / (d[x].square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in ("q", "k", "p", "ks")}
    call = getattr(fla, name)
    got = call(*by_place(name, d), **FIXED.get(name, {}), use_qk_l2norm_in_kernel=True)[0]
    assert_same(got, call(*by_place(name, d | made), **FIXED.get(name, {}))[0])
    assert not torch.allclose(got, call(*by_place(name, d), **FIXED.get(name, {}))[0])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("packed", [False, True])
def test_no_tokens_at_all(name: str, packed: bool) -> None:
    d, states = states_draw(batch=1 if packed else 2, length=0), normal(2, 3, 5, 4)
    more: Drawn = {"cu_seqlens": torch.tensor([0, 0, 0])} if packed else {}
    o, last = getattr(fla, name)(
        *by_place(name, d), **FIXED.get(name, {}), **more, initial_state=states, output_final_state=True
    )
    assert o.shape == (1 if packed else 2, 0, 3, 4)
    assert_same(last, states)


def test_comba_recalls_by_its_keys_and_writes_fully_where_nothing_else_is_said() -> None:
    d = states_draw()
    d["p"], d["beta"] = d["k"], torch.ones_like(d["beta"])
    wanted = plain(comba_token, d, torch.zeros(2, 3, 5, 4).double(), 5**-0.5)[0]
    assert_same(fla.chunk_comba(d["q"], d["k"], d["v"], None, d["g"])[0], wanted)
    assert_same(fla.fused_recurrent_comba(d["q"], d["k"], None, d["v"], d["g"])[0], wanted)


def test_delta_products_need_not_fade() -> None:
    d = states_draw()
    d["g"] = torch.zeros_like(d["g"])
    got = fla.chunk_gated_delta_product(d["q"], d["ks"], d["vs"], None, d["betas"], STEPS)[0]
    assert_same(got, plain(product_token, d, torch.zeros(2, 3, 5, 4).double(), 5**-0.5)[0])


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("name", ["chunk_gdn2", "fused_recurrent_gdn2"])
def test_gdn2_gates_can_be_made_inside(name: str, bounded: bool) -> None:
    d, raw = states_draw(), normal(2, 19, 3, 5)
    A_log, bias = normal(3), normal(15)
    shifted, rate = raw + bias.view(3, 5), A_log.exp().view(3, 1)
    d["gk"] = -4 / (1 + (-rate * shifted).exp()) if bounded else -rate * softplus(shifted)
    wanted = plain(gdn2_token, d, torch.zeros(2, 3, 5, 4).double(), 5**-0.5)[0]
    got = getattr(fla, name)(
        *by_place(name, d | {"gk": raw}), use_gate_in_kernel=True, A_log=A_log, dt_bias=bias,
        lower_bound=-4.0 if bounded else None,
    )[0]  # fmt: skip
    assert_same(got, wanted)


@pytest.mark.parametrize("name", ["chunk_gdn2", "fused_recurrent_gdn2", "chunk_lightnet", "fused_recurrent_lightnet"])
def test_states_may_have_the_values_first(name: str) -> None:
    d, states = states_draw(), normal(2, 3, 5, 4)
    tensors = by_place(name, d) if name in CALLS else [d["q"], d["k"], d["v"]]
    call, pair = getattr(fla, name), name not in CALLS
    o, last = call(*tensors, initial_state=(states, None) if pair else states, output_final_state=True)
    turned = states.mT.contiguous()
    turned_o, turned_last = call(
        *tensors, initial_state=(turned, None) if pair else turned, output_final_state=True, state_v_first=True
    )
    assert torch.equal(turned_o, o)
    assert torch.equal((turned_last[0] if pair else turned_last).mT, last[0] if pair else last)


# ---- LightNet --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["chunk_lightnet", "fused_recurrent_lightnet"])
def test_lightnet_is_a_softmax_over_the_tokens_so_far(name: str, packed: bool, started: bool) -> None:
    batch, offsets, count = (1, OFFSETS, 4) if packed else (2, None, 2)
    d = {key: x.requires_grad_() for key, x in states_draw(2, batch).items() if key in "qv"}
    d["logits"] = normal(batch, 19, 3, 5).requires_grad_()
    held, z = normal(count, 6, 5, 4).requires_grad_(), normal(count, 1, 3, 5).requires_grad_()
    more: Drawn = {"cu_seqlens": torch.tensor(offsets)} if packed else {}
    more |= {"initial_state": (held, z)} if started else {}
    o, (last, last_z) = getattr(fla, name)(d["q"], d["logits"], d["v"], 0.3, output_final_state=True, **more)

    # all of it in exponentials: the state as a sum, divided by the sum of weights at every token
    weight = z.exp() if started else torch.zeros_like(z)
    sums = held * z.exp().squeeze(1).repeat_interleave(2, 1).unsqueeze(-1) if started else torch.zeros_like(held)
    outs, lasts, weights = {}, [], []
    for number, (b, start, end) in enumerate(stretches(batch, 19, offsets)):
        for h in range(6):
            state, total = sums[number, h], weight[number, 0, h // 2]
            for t in range(start, end):
                state = lightnet_token(d, b, t, h, h // 2, state)
                total = total + d["logits"][b, t, h // 2].exp()
                outs[b, t, h] = 0.3 * d["q"][b, t, h // 2] @ (state / total[:, None])
            lasts.append(state / total[:, None] if start < end or started else state)
            weights.append(total.log())
    wanted = torch.stack([torch.stack([torch.stack([outs[b, t, h] for h in range(6)]) for t in range(19)])
                          for b in range(batch)])  # fmt: skip
    wanted_z = torch.stack(weights).unflatten(0, (count, 6))[:, ::2].unsqueeze(1)
    assert_same(o, wanted)
    assert_same(last, torch.stack(lasts).unflatten(0, (count, 6)))
    assert_same(last_z, wanted_z)
    leaves = [*d.values(), *((held, z) if started else ())]
    cotangent = torch.randn_like(o)
    for ours, theirs in zip(
        torch.autograd.grad(o, leaves, cotangent), torch.autograd.grad(wanted, leaves, cotangent), strict=True
    ):
        assert_same(ours, theirs)


def test_lightnet_does_not_overflow() -> None:
    """Logits far beyond what exponentials hold: only their differences count."""
    q, v, logits = normal(1, 9, 2, 5), normal(1, 9, 2, 4), normal(1, 9, 2, 5)
    wanted = fla.chunk_lightnet(q, logits, v)[0]
    assert_same(fla.chunk_lightnet(q, logits + 4096.0, v)[0], wanted)
    low = fla.chunk_lightnet(q.float(), (logits - 4096.0).float(), v.float())[0]
    torch.testing.assert_close(low.double(), wanted, rtol=1e-2, atol=1e-2)


def test_additive_gates_go_on_from_their_last_sums() -> None:
    x = normal(2, 9, 3, 5)
    key, g, z = fla.fused_additive_gate(x)
    sums = x.exp().cumsum(1)
    assert_same(key, x.exp() / sums)
    assert_same(g[:, 1:], (sums[:, :-1] / sums[:, 1:]).log())
    assert_same(g[:, 0], torch.zeros_like(g[:, 0]))
    assert_same(z, sums[:, -1:].log())
    _, _, half = fla.fused_additive_gate(x[:, :4])
    again = fla.fused_additive_gate(x[:, 4:], half)
    assert_same(again, (key[:, 4:], g[:, 4:], z))
    kinds = fla.fused_additive_gate(x.bfloat16(), gate_dtype=torch.float32)
    assert [t.dtype for t in kinds] == [torch.bfloat16, torch.float32, torch.float32]


# ---- RWKV-4 ----------------------------------------------------------------------------------------------------


def rwkv4_draw(length: int = 13) -> list[Tensor]:
    state = torch.stack([normal(2, 1, 6), uniform(2, 1, 6) + 0.1, normal(2, 1, 6)], 1)
    return [normal(6), normal(6), normal(2, length, 6), normal(2, length, 6), state]


def plain_rwkv4(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The averages in plain exponentials, and the two sums."""
    total, weight = state[:, 0, 0] * state[:, 2, 0].exp(), state[:, 1, 0] * state[:, 2, 0].exp()
    outs = []
    for t in range(k.shape[1]):
        own = (u + k[:, t]).exp()
        outs.append((total + own * v[:, t]) / (weight + own))
        fade = (-w.exp()).exp()
        total, weight = fade * total + k[:, t].exp() * v[:, t], fade * weight + k[:, t].exp()
    return torch.stack(outs, 1), torch.stack([total, weight], 1)


def test_rwkv4_is_a_fading_average() -> None:
    leaves = [x.requires_grad_() for x in rwkv4_draw()]
    wkv, state = fla.fused_recurrent_rwkv4(*leaves)
    wanted, sums = plain_rwkv4(*leaves)
    assert state.shape == (2, 3, 1, 6)
    got = state[:, :2, 0] * state[:, 2:, 0].exp()
    assert_same(wkv, wanted)
    assert_same(got, sums)
    cotangents = [torch.randn_like(wanted), torch.randn_like(sums)]
    for ours, theirs in zip(
        torch.autograd.grad([wkv, got], leaves, cotangents),
        torch.autograd.grad([wanted, sums], leaves, cotangents),
        strict=True,
    ):
        assert_same(ours, theirs)


def test_rwkv4_goes_on_from_its_state_and_from_none() -> None:
    w, u, k, v, _ = rwkv4_draw()
    nothing = torch.zeros(2, 3, 1, 6, dtype=torch.float64)
    nothing[:, 2] = -torch.inf
    whole, last = fla.fused_recurrent_rwkv4(w, u, k, v, nothing)
    assert_same(whole, plain_rwkv4(w, u, k, v, torch.zeros(2, 3, 1, 6, dtype=torch.float64))[0])
    first, between = fla.fused_recurrent_rwkv4(w, u, k[:, :5], v[:, :5], nothing)
    second, end = fla.fused_recurrent_rwkv4(w, u, k[:, 5:], v[:, 5:], between)
    assert_same(torch.cat([first, second], 1), whole)
    assert_same(end, last)
    out, same = fla.fused_recurrent_rwkv4(w, u, k[:, :0], v[:, :0], between)
    assert out.shape == (2, 0, 6)
    assert_same(same, between)
    loud, _ = fla.fused_recurrent_rwkv4(w.float(), u.float(), (k + 900).float(), v.float(), nothing.float())
    torch.testing.assert_close(loud.double(), whole, rtol=1e-3, atol=1e-3)
    low, state = fla.fused_recurrent_rwkv4(w.float(), u.float(), k.bfloat16(), v.bfloat16(), nothing.float())
    assert low.dtype == torch.bfloat16 and state.dtype == torch.float32


# ---- polynomials -----------------------------------------------------------------------------------------------


def plain_polynomial(q: Tensor, k: Tensor, v: Tensor, weigh: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Sums of weighed values [B, T, H, V] and of weights [B, T, H], in whole matrices."""
    weights = weigh(torch.einsum("bihd,bjhd->bhij", q, k)).tril()
    return torch.einsum("bhij,bjhd->bihd", weights, v), weights.sum(-1).transpose(1, 2)


@pytest.mark.parametrize(("length", "dim"), [(19, 8), (40, 4), (0, 4)])  # by pairs, by features
@pytest.mark.parametrize("name", ["parallel_based", "fused_chunk_based"])
def test_based_is_a_taylor_series(name: str, length: int, dim: int) -> None:
    q, k, v = (normal(2, length, 3, d).requires_grad_() for d in (dim, dim, 5))
    for scale, norm in ((None, True), (0.3, False), (-0.2, True)):
        got = getattr(fla, name)(q, k, v, scale, norm)
        factor = dim**-0.5 if scale is None else scale
        sums, total = plain_polynomial(q, k, v, lambda s, by=factor: 1 + by * s + (by * s) ** 2 / 2)
        wanted = sums / (total.unsqueeze(-1) + 1e-6) if norm else sums
        assert_same(got, wanted)
        cotangent = torch.randn_like(wanted)
        pairs = (torch.autograd.grad(x, (q, k, v), cotangent) for x in (got, wanted))
        for ours, theirs in zip(*pairs, strict=True):
            assert_same(ours, theirs)


@pytest.mark.parametrize(("length", "dim"), [(19, 8), (40, 4)])
def test_rebased_squares_its_scores(length: int, dim: int) -> None:
    q, k, v = (normal(2, length, 3, d) for d in (dim, dim, 5))
    for scaled in (True, False):
        factor = 1 / dim if scaled else 1.0
        sums, total = plain_polynomial(q, k, v, lambda s, by=factor: by * s**2)
        assert_same(fla.parallel_rebased(q, k, v, 1e-2, scaled), sums / (total.unsqueeze(-1) + 1e-2))
        assert_same(fla.parallel_rebased(q, k, v, use_scale=scaled, use_normalize=False), sums)
        both = fla.parallel_rebased(q, k, v, use_scale=scaled, return_both=True)
        assert_same(both, (sums.transpose(1, 2), total.transpose(1, 2)))
    sums, total = plain_polynomial(q, k, v, lambda s: s**2 / dim)
    assert_same(fla.parallel_rebased(q, k, v), sums / (total.unsqueeze(-1) + 1e-5))


@pytest.mark.parametrize("length", [19, 40])
def test_polynomials_round_once(length: int) -> None:
    q, k, v = (normal(2, length, 3, d).bfloat16() for d in (4, 4, 5))
    for call in (fla.parallel_based, fla.fused_chunk_based, fla.parallel_rebased):
        got, exact = call(q, k, v), call(q.double(), k.double(), v.double())
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), exact, rtol=2.0**-7, atol=1e-3)


# ---- gates -----------------------------------------------------------------------------------------------------


def test_gates_are_their_formulas() -> None:
    raw, A_log, bias = normal(2, 7, 3), normal(3), normal(3)
    exact = torch.float64
    wanted = -A_log.exp() * (1 + (raw + bias).exp()).log()
    assert_same(fla.fused_gdn_gate(raw, A_log, bias, exact), wanted)
    assert_same(fla.fused_gdn_gate(raw, A_log, output_dtype=exact), -A_log.exp() * (1 + raw.exp()).log())
    raw, bias = normal(2, 7, 3, 5), normal(15)
    shifted, rate = raw + bias.view(3, 5), A_log.exp().view(3, 1)
    assert_same(fla.fused_kda_gate(raw, A_log, bias, output_dtype=exact), -rate * (1 + shifted.exp()).log())
    assert_same(fla.fused_kda_gate(raw, A_log, bias, -4.0, exact), -4 / (1 + (-rate * shifted).exp()))
    assert_same(fla.fused_kda_gate(raw, None, bias, -4.0, exact), -4 / (1 + (-shifted).exp()))
    assert_same(fla.fused_beta_sigmoid(raw, 2.0), 2 / (1 + (-raw).exp()))
    for gate in (fla.fused_gdn_gate(raw[..., 0].bfloat16(), A_log), fla.fused_kda_gate(raw.bfloat16(), A_log)):
        assert gate.dtype == torch.float32
    assert fla.fused_beta_sigmoid(raw.bfloat16()).dtype == torch.float32


# ---- refusals --------------------------------------------------------------------------------------------------

Q, G, LONG = torch.randn(1, 12, 2, 4), -torch.rand(1, 12, 2), torch.randn(1, 24, 2, 4)
WHOLE, CHANNEL, STATE = torch.tensor([0, 12]), -torch.rand(1, 12, 2, 4), torch.zeros(1, 3, 1, 4)
TWO = torch.randn(1, 24, 2)


def product(**changes: Any) -> Any:
    given = {"q": Q, "k": LONG, "v": LONG, "g": G, "beta": TWO.sigmoid(), "num_householder": 2}
    return fla.chunk_gated_delta_product(**given | changes)


def gdn2(**changes: Any) -> Any:
    return fla.chunk_gdn2(**{"q": Q, "k": Q, "v": Q, "g": CHANNEL, "b": -CHANNEL, "w": -CHANNEL} | changes)


REFUSED: list[tuple[str, Callable[[], Any], type[Exception]]] = [
    ("p must be as k", lambda: fla.chunk_comba(Q, Q, Q, Q[..., :3], G), ValueError),
    ("g must be", lambda: fla.chunk_comba(Q, Q, Q, Q, CHANNEL), ValueError),
    ("beta must be", lambda: fla.chunk_comba(Q, Q, Q, Q, G, CHANNEL), ValueError),
    ("cp_context", lambda: product(cp_context=object()), NotImplementedError),
    ("at least 1; got 0", lambda: product(num_householder=0), ValueError),
    ("hold 3 steps to each of the 12", lambda: product(num_householder=3), ValueError),
    (r"g must be \[B, T, HV\]", lambda: product(g=TWO), ValueError),
    ("beta must be", lambda: product(beta=G.sigmoid()), ValueError),
    ("rise from 0 to the 12", lambda: product(cu_seqlens=torch.tensor([0, 24])), ValueError),
    ("cp_context", lambda: gdn2(cp_context=object()), NotImplementedError),
    ("only the last state", lambda: gdn2(return_intermediate_states=True), NotImplementedError),
    ("pass lower_bound", lambda: gdn2(safe_gate=True, use_gate_in_kernel=True, A_log=G), ValueError),
    ("w must be as v", lambda: gdn2(w=G), ValueError),
    ("b must be", lambda: gdn2(b=G), ValueError),
    ("g must be", lambda: gdn2(g=G), ValueError),
    ("pass A_log, or lower_bound", lambda: gdn2(use_gate_in_kernel=True), ValueError),
    ("z must be", lambda: fla.chunk_lightnet(Q, Q, Q, initial_state=(None, CHANNEL)), ValueError),
    ("logits must be", lambda: fla.fused_additive_gate(G), ValueError),
    ("multiple of those of q", lambda: fla.chunk_lightnet(Q, Q, Q[:, :, :1]), ValueError),
    (r"w and u \[C\]", lambda: fla.fused_recurrent_rwkv4(Q[0, 0, 0], G[0, 0], G, G, STATE), ValueError),
    ("state must be", lambda: fla.fused_recurrent_rwkv4(G[0, 0], G[0, 0], G, G, STATE), ValueError),
    ("one shape", lambda: fla.parallel_based(Q, Q[:, :5], Q), ValueError),
    ("pass A_log", lambda: fla.fused_gdn_gate(G, None), ValueError),
    ("A_log must have 2", lambda: fla.fused_kda_gate(CHANNEL, G), ValueError),
    ("lower_bound bounds", lambda: fla.fused_kda_gate(CHANNEL, lower_bound=5.0), ValueError),
]


@pytest.mark.parametrize(("words", "call", "kind"), REFUSED, ids=[words for words, *_ in REFUSED])
def test_what_cannot_be_honoured_is_refused_in_words(words: str, call: Callable[[], Any], kind: type) -> None:
    with pytest.raises(kind, match=words):
        call()
