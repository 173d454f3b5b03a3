"""foveate.compat.fla computes what flash-linear-attention's functions do, in their layout."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tests.support.compat_inputs import (
    CASES,
    FIXED,
    assert_same,
    both,
    chosen,
    draw,
    options_of,
    plain,
    states_for,
    with_option,
)
from torch import Tensor

from foveate.compat import fla


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", [1, 2])
def test_outputs_and_states_are_those_of_a_loop(name: str, share: int) -> None:
    assert_same(*both(name, draw(share=share), 2))


@pytest.mark.parametrize("name", with_option("cu_seqlens"))
def test_packed_sequences_know_nothing_of_each_other(name: str) -> None:
    offsets = [0, 4, 4, 19, 37]
    dtype = random.choice([torch.int32, torch.int64])
    more = {"cu_seqlens": torch.tensor(offsets, dtype=dtype)}
    if "cu_seqlens_cpu" in options_of(name):
        more["cu_seqlens_cpu"] = more["cu_seqlens"].clone()
    assert_same(*both(name, draw(batch=1), 4, offsets, **more))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", with_option("reverse"))
def test_reverse_runs_from_the_end(name: str, packed: bool) -> None:
    drawn, theirs = draw(batch=1 if packed else 2), CASES[name][0]
    offsets = [0, 4, 4, 19, 37] if packed else None
    states = states_for(drawn, 4 if packed else 2)
    more: dict[str, Any] = {} if offsets is None else {"cu_seqlens": torch.tensor(offsets)}
    got = getattr(fla, name)(
        **chosen(drawn, theirs), **FIXED.get(name, {}), scale=0.3, reverse=True,
        initial_state=states, output_final_state=True, **more,
    )  # fmt: skip
    turned = {key: x.flip(1) if x.dim() > 2 else x for key, x in drawn.items()}
    back = None if offsets is None else [37 - offset for offset in reversed(offsets)]
    order = slice(None) if offsets is None else [3, 2, 1, 0]
    meaning = chosen(turned, CASES[name][1])
    out, last = plain(turned["q"], turned["k"], turned["v"], 0.3, states[order], back, **meaning)
    assert_same(got, (out.flip(1), last[order]))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_loop(name: str) -> None:
    drawn = draw(length=9, share=random.choice([1, 2]))
    drawn = {key: x.requires_grad_() for key, x in drawn.items()}
    got, wanted = both(name, drawn, 2)
    needed = [drawn[word.partition(":")[2] or word] for word in CASES[name][0].split()]
    cotangents = [None if x is None else torch.randn_like(x) for x in wanted]

    def gradients(results: tuple[Any, ...]) -> tuple[Tensor, ...]:
        pairs = [(x, c) for x, c in zip(results, cotangents, strict=True) if x is not None]
        return torch.autograd.grad(sum((x * c).sum() for x, c in pairs), needed)

    for ours, theirs in zip(gradients(got), gradients(wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", with_option("state_v_first"))
def test_states_may_have_the_values_first(name: str) -> None:
    drawn = draw()
    states = states_for(drawn, 2)
    call = {**chosen(drawn, CASES[name][0]), "output_final_state": True}
    function = getattr(fla, name)
    o, last = function(**call, initial_state=states)
    turned, turned_last = function(**call, initial_state=states.mT.contiguous(), state_v_first=True)
    assert torch.equal(turned, o) and torch.equal(turned_last.mT, last)


@pytest.mark.parametrize("name", CASES)
def test_defaults(name: str) -> None:
    """No state unless asked for, scale 1 / sqrt(K), float32 states beside half-precision inputs."""
    drawn = {key: x.bfloat16() for key, x in draw().items()}
    call = chosen(drawn, CASES[name][0]) | FIXED.get(name, {})
    o, state = getattr(fla, name)(**call)
    assert o.dtype == torch.bfloat16 and o.shape == drawn["v"].shape
    scaled = 1.0 if name == "chunk_rwkv7" else 5**-0.5
    assert torch.equal(o, getattr(fla, name)(**call, scale=scaled)[0])
    assert (state is None) == (name != "fused_recurrent_rwkv7")
    if "output_final_state" in options_of(name):
        assert getattr(fla, name)(**call, output_final_state=True)[1].dtype == torch.float32
