"""foveate.compat.mamba computes what mamba_ssm's functions of states with heads do, in their layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.mamba_inputs import assert_same, heads, normal, plain_heads
from torch.nn.functional import softplus

from foveate.compat.mamba import (
    mamba_chunk_scan_combined,
)


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


SEQ = torch.zeros(2, 9, dtype=torch.int)
REFUSED: list[tuple[str, dict[str, Any], type[Exception]]] = [
    ("return_varlen_states", {"return_varlen_states": True}, NotImplementedError),
    (
        "beside seq_idx",
        {"seq_idx": torch.zeros(2, 13, dtype=torch.int), "initial_states": torch.zeros(2, 4, 5, 3)},
        NotImplementedError,
    ),
    ("x must be", {"x": torch.zeros(2, 13, 20)}, ValueError),
    ("dt must be", {"dt": torch.zeros(2, 4, 13)}, ValueError),
    ("multiple of the 3 groups", {"B": torch.zeros(2, 13, 3, 3)}, ValueError),
    (r"seq_idx must be .*\(2, 13\)", {"seq_idx": SEQ}, ValueError),
    ("whole numbers", {"seq_idx": torch.zeros(2, 13)}, TypeError),
]


@pytest.mark.parametrize(("words", "changes", "kind"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_honoured_is_refused_in_words(words: str, changes: dict[str, Any], kind: type) -> None:
    with pytest.raises(kind, match=words):
        mamba_chunk_scan_combined(**heads() | changes, chunk_size=8)
