"""foveate.compat.mamba computes what mamba_ssm's and causal_conv1d's functions do, in their layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from foveate.compat.mamba import (
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba_chunk_scan_combined,
    selective_scan_fn,
    selective_state_update,
)

Drawn = dict[str, Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def assert_same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


# ---- Mamba-2 ---------------------------------------------------------------------------------------------------


def heads(batch: int = 2, length: int = 13, groups: int = 2, d_per_channel: bool = False) -> Drawn:
    """Four heads of 5 channels, states of 3."""
    vectors = batch, length, groups, 3
    return {
        "x": normal(batch, length, 4, 5),
        "dt": normal(batch, length, 4),
        "A": -torch.rand(4, dtype=torch.float64),
        "B": normal(*vectors),
        "C": normal(*vectors),
        "D": normal(4, 5) if d_per_channel else normal(4),
        "z": normal(batch, length, 4, 5),
        "dt_bias": normal(4),
    }


def plain_heads(drawn: Drawn, states: Tensor, starts: set[tuple[int, int]] = frozenset()) -> tuple[Tensor, Tensor]:
    """One token and head after another; the state is zero again at ``starts`` (row, token)."""
    x, dt, A, B, C, D, z, bias = (drawn[name] for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias"))
    share, out, states = x.shape[2] // B.shape[2], torch.empty_like(x), states.clone()
    last = [[torch.empty(0)] * x.shape[2] for _ in x]
    for b in range(x.shape[0]):
        for h in range(x.shape[2]):
            state = states[b, h]
            for t in range(x.shape[1]):
                state = torch.zeros_like(state) if (b, t) in starts else state
                step = softplus(dt[b, t, h] + bias[h])
                state = (step * A[h]).exp() * state + step * x[b, t, h].outer(B[b, t, h // share])
                out[b, t, h] = state @ C[b, t, h // share] + D[h] * x[b, t, h]
            last[b][h] = state
    return out * silu(z), torch.stack([torch.stack(row) for row in last])


@pytest.mark.parametrize("d_per_channel", [False, True])
def test_mamba2_is_that_of_a_loop(d_per_channel: bool) -> None:
    drawn, states = heads(d_per_channel=d_per_channel), normal(2, 4, 5, 3)
    out, last = mamba_chunk_scan_combined(
        **drawn, chunk_size=8, initial_states=states, dt_softplus=True, return_final_states=True
    )
    wanted, wanted_last = plain_heads(drawn, states)
    assert_same(out, wanted)
    assert_same(last, wanted_last)


def test_mamba2_gradients_are_those_of_the_loop() -> None:
    drawn = {name: x.requires_grad_() for name, x in heads(length=7).items()}
    states = normal(2, 4, 5, 3).requires_grad_()
    results = mamba_chunk_scan_combined(
        **drawn, chunk_size=8, initial_states=states, dt_softplus=True, return_final_states=True
    )
    cotangents = [torch.randn_like(x) for x in results]
    got = torch.autograd.grad(results, [*drawn.values(), states], cotangents)
    wanted = torch.autograd.grad(plain_heads(drawn, states), [*drawn.values(), states], cotangents)
    for ours, theirs in zip(got, wanted, strict=True):
        assert_same(ours, theirs)


def test_mamba2_begins_again_where_seq_idx_changes() -> None:
    drawn = heads()
    seq_idx = torch.tensor([[0] * 4 + [1] * 9, [0] * 1 + [1] * 7 + [2] * 5])
    out, last = mamba_chunk_scan_combined(
        **drawn, chunk_size=8, seq_idx=seq_idx, dt_softplus=True, return_final_states=True
    )
    wanted, wanted_last = plain_heads(drawn, torch.zeros(2, 4, 5, 3).double(), {(0, 4), (1, 1), (1, 8)})
    assert_same(out, wanted)
    assert_same(last, wanted_last)


def test_mamba2_limits_its_steps() -> None:
    drawn = heads()
    wide, narrow = (
        mamba_chunk_scan_combined(**drawn, chunk_size=8, dt_softplus=True, dt_limit=limit)
        for limit in ((0.0, 1e9), (0.3, 0.4))
    )
    step = softplus(drawn["dt"] + drawn["dt_bias"]).clamp(0.3, 0.4)
    set_by_hand = drawn | {"dt": step, "dt_bias": torch.zeros(4, dtype=torch.float64)}
    assert_same(narrow, mamba_chunk_scan_combined(**set_by_hand, chunk_size=8))
    assert not torch.allclose(wide, narrow)


def test_half_precision_comes_back_with_float32_states() -> None:
    drawn = {name: x.bfloat16() for name, x in heads().items()}
    out, last = mamba_chunk_scan_combined(**drawn, chunk_size=8, dt_softplus=True, return_final_states=True)
    assert out.dtype == torch.bfloat16 and last.dtype == torch.float32


# ---- Mamba -----------------------------------------------------------------------------------------------------


def channels(vectors: str = "plain", batch: int = 2, length: int = 13) -> Drawn:
    """Six channels, states of 3; B and C shared by all, by groups of channels, or constant."""
    shape = {"plain": (batch, 3, length), "groups": (batch, 2, 3, length), "constant": (6, 3)}[vectors]
    return {
        "u": normal(batch, 6, length),
        "delta": normal(batch, 6, length),
        "A": -torch.rand(6, 3, dtype=torch.float64),
        "B": normal(*shape),
        "C": normal(*shape),
        "D": normal(6),
        "z": normal(batch, 6, length),
        "delta_bias": normal(6),
    }


def plain_channels(drawn: Drawn) -> tuple[Tensor, Tensor]:
    u, delta, A, B, C, D, z, bias = drawn.values()
    batch, width, length = u.shape

    def at(x: Tensor, b: int, c: int, t: int) -> Tensor:
        if x.shape == A.shape:
            return x[c]
        return x[b, :, t] if x.dim() == 3 else x[b, c // (width // x.shape[1]), :, t]

    out, last = torch.empty_like(u), []
    for b in range(batch):
        for c in range(width):
            state = torch.zeros(3, dtype=u.dtype)
            for t in range(length):
                step = softplus(delta[b, c, t] + bias[c])
                state = (step * A[c]).exp() * state + step * u[b, c, t] * at(B, b, c, t)
                out[b, c, t] = at(C, b, c, t) @ state + D[c] * u[b, c, t]
            last.append(state)
    return out * silu(z), torch.stack(last).unflatten(0, (batch, width))


@pytest.mark.parametrize("vectors", ["plain", "groups", "constant"])
def test_selective_scan_is_that_of_a_loop(vectors: str) -> None:
    drawn = {name: x.requires_grad_() for name, x in channels(vectors).items()}
    results = selective_scan_fn(**drawn, delta_softplus=True, return_last_state=True)
    wanted = plain_channels(drawn)
    cotangents = [torch.randn_like(x) for x in wanted]
    pairs = [*zip(results, wanted, strict=True)]
    pairs += zip(
        torch.autograd.grad(results, list(drawn.values()), cotangents),
        torch.autograd.grad(wanted, list(drawn.values()), cotangents),
        strict=True,
    )
    for ours, theirs in pairs:
        assert_same(ours, theirs)
    assert_same(selective_scan_fn(**drawn, delta_softplus=True), results[0])


@pytest.mark.parametrize("indexed", [False, True])
def test_state_updates_follow_the_scan(indexed: bool) -> None:
    drawn = channels()
    wanted, wanted_last = selective_scan_fn(**drawn, delta_softplus=True, return_last_state=True)
    u, delta, A, B, C, D, z, bias = drawn.values()
    rows = torch.tensor([3, 0]) if indexed else None
    state = torch.zeros(5 if indexed else 2, 6, 3)
    for t in range(u.shape[2]):
        out = selective_state_update(
            state, u[..., t], delta[..., t], A, B[..., t], C[..., t], D, z[..., t], bias, True, rows
        )
        torch.testing.assert_close(out, wanted[..., t], rtol=1e-4, atol=1e-5)
    got = state if rows is None else state[rows]
    torch.testing.assert_close(got.double(), wanted_last, rtol=1e-4, atol=1e-5)


def test_state_updates_with_heads_follow_mamba2() -> None:
    drawn, states = heads(d_per_channel=True), normal(2, 4, 5, 3)
    wanted, wanted_last = plain_heads(drawn, states)
    x, dt, A, B, C, D, z, bias = drawn.values()
    state = states.clone()
    for t in range(x.shape[1]):
        out = selective_state_update(
            state,
            x[:, t],
            dt[:, t, :, None].expand(-1, -1, 5),
            A[:, None, None].expand(-1, 5, 3),
            B[:, t],
            C[:, t],
            D,
            z[:, t],
            bias[:, None].expand(-1, 5),
            dt_softplus=True,
        )
        assert_same(out, wanted[:, t])
    assert_same(state, wanted_last)


# ---- convolution -----------------------------------------------------------------------------------------------


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor) -> Tensor:
    padded, width = torch.cat((tail, x), 2), weight.shape[1]
    taps = [weight[:, i, None] * padded[:, :, i : i + x.shape[2]] for i in range(width)]
    out = sum(taps, torch.zeros_like(x))
    return out if bias is None else out + bias[:, None]


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_convolution_is_a_sum_of_taps(activation: str | None) -> None:
    x, weight, bias, tail = normal(2, 6, 11), normal(6, 4), normal(6), normal(2, 6, 3)
    out, last = causal_conv1d_fn(x, weight, bias, initial_states=tail, return_final_states=True, activation=activation)
    wanted = plain_conv(x, weight, bias, tail)
    assert_same(out, silu(wanted) if activation else wanted)
    assert_same(last, x[:, :, -3:])


def test_convolution_begins_again_where_seq_idx_changes() -> None:
    x, weight = normal(2, 6, 9), normal(6, 4)
    seq_idx = torch.tensor([[0] * 2 + [1] * 7, [5] * 8 + [2]])
    parts = [[x[:1, :, :2], x[:1, :, 2:]], [x[1:, :, :8], x[1:, :, 8:]]]
    nothing = torch.zeros(1, 6, 3, dtype=torch.float64)
    wanted = [torch.cat([plain_conv(part, weight, None, nothing) for part in row], 2) for row in parts]
    assert_same(causal_conv1d_fn(x, weight, seq_idx=seq_idx), torch.cat(wanted))


@pytest.mark.parametrize("kept", [3, 4, 7])
def test_updates_follow_the_convolution(kept: int) -> None:
    x, weight, bias = normal(2, 6, 11), normal(6, 4), normal(6)
    wanted, state = causal_conv1d_fn(x, weight, bias, activation="silu"), normal(2, 6, kept)
    state[..., -3:] = 0
    first = causal_conv1d_update(x[..., :5], state, weight, bias, "silu")
    rest = [causal_conv1d_update(x[..., t], state, weight, bias, "silu") for t in range(5, 11)]
    assert_same(torch.cat((first, torch.stack(rest, 2)), 2), wanted)
    assert_same(state, x[..., -kept:])


# ---- refusals --------------------------------------------------------------------------------------------------


def scanned(**changes: Any) -> Any:
    return mamba_chunk_scan_combined(**heads() | changes, chunk_size=8)


X, W, SEQ = torch.randn(2, 6, 9), torch.randn(6, 4), torch.zeros(2, 9, dtype=torch.int)
REFUSED: list[tuple[str, Callable[[], Any], type[Exception]]] = [
    ("return_varlen_states", lambda: scanned(return_varlen_states=True), NotImplementedError),
    (
        "beside seq_idx",
        lambda: scanned(seq_idx=torch.zeros(2, 13, dtype=torch.int), initial_states=torch.zeros(2, 4, 5, 3)),
        NotImplementedError,
    ),
    ("x must be", lambda: scanned(x=torch.randn(2, 13, 20)), ValueError),
    ("dt must be", lambda: scanned(dt=torch.randn(2, 4, 13)), ValueError),
    ("multiple of the 3 groups", lambda: scanned(B=torch.randn(2, 13, 3, 3)), ValueError),
    (r"seq_idx must be .*\(2, 13\)", lambda: scanned(seq_idx=SEQ), ValueError),
    ("whole numbers", lambda: scanned(seq_idx=torch.zeros(2, 13)), TypeError),
    ("A must be real", lambda: selective_scan_fn(**channels() | {"A": torch.randn(6, 3) + 0j}), NotImplementedError),
    ("u must be", lambda: selective_scan_fn(**channels() | {"A": torch.randn(13, 3)}), ValueError),
    ("B must be", lambda: selective_scan_fn(**channels() | {"B": torch.randn(2, 13, 3)}), ValueError),
    ("x must be", lambda: selective_state_update(X[..., :3], X[..., 0].T, X[..., 0], W[:, :3], W, W), ValueError),
    ("final_states_out", lambda: causal_conv1d_fn(X, W, final_states_out=X), NotImplementedError),
    ("leave it out", lambda: causal_conv1d_fn(X, W, seq_idx=SEQ, return_final_states=True), NotImplementedError),
    ("activation must be", lambda: causal_conv1d_fn(X, W, activation="gelu"), NotImplementedError),
    ("x must be", lambda: causal_conv1d_fn(X.mT, W), ValueError),
    ("cache_seqlens", lambda: causal_conv1d_update(X, X, W, cache_seqlens=SEQ), NotImplementedError),
    ("conv_state must be", lambda: causal_conv1d_update(X, X[..., :2], W), ValueError),
]


@pytest.mark.parametrize(("words", "call", "kind"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_honoured_is_refused_in_words(words: str, call: Callable[[], Any], kind: type) -> None:
    with pytest.raises(kind, match=words):
        call()
