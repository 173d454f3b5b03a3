"""foveate.compat.mamba computes what causal_conv1d's functions do, in their layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support.mamba_inputs import assert_same, normal
from torch import Tensor
from torch.nn.functional import silu

from foveate.compat.mamba import (
    causal_conv1d_fn,
    causal_conv1d_update,
)


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


X, W, SEQ = torch.zeros(2, 6, 9), torch.zeros(6, 4), torch.zeros(2, 9, dtype=torch.int)
REFUSED: list[tuple[str, Callable[[], Any], type[Exception]]] = [
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
