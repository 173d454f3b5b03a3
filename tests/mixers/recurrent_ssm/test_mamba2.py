"""Mamba-2 as linear attention with a decay a head."""

from __future__ import annotations

import pytest
import torch
from tests.support.scan_formulas import (
    DIM,
    convolved,
    shaken,
    tokens,
)
from torch.nn.functional import silu
from torch.testing import assert_close

from foveate.mixers.recurrent_ssm.mamba2 import Mamba2
from foveate.recurrence import recur
from foveate.recurrence.selective.api import scan


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


def test_heads_that_do_not_fit_are_refused() -> None:
    for message, options in (
        ("whole numbers of heads", {"heads": 4, "groups": 3}),
        ("heads must divide", {"heads": 3}),
    ):
        with pytest.raises(ValueError, match=message):
            Mamba2(8, **options)
