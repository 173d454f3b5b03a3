"""foveate.compat.mamba computes what mamba_ssm's selective scan and its steps do, in their layout."""

from __future__ import annotations

import pytest
import torch
from tests.support.mamba_inputs import Drawn, assert_same, channels, heads, normal, plain_channels, plain_heads

from foveate.compat.mamba import (
    selective_scan_fn,
    selective_state_update,
)


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


@pytest.mark.parametrize(
    ("words", "changes", "kind"),
    [
        ("A must be real", {"A": torch.zeros(6, 3) + 0j}, NotImplementedError),
        ("u must be", {"A": torch.zeros(13, 3)}, ValueError),
        ("B must be", {"B": torch.zeros(2, 13, 3)}, ValueError),
    ],
)
def test_a_scan_that_cannot_be_honoured_is_refused_in_words(words: str, changes: Drawn, kind: type) -> None:
    with pytest.raises(kind, match=words):
        selective_scan_fn(**channels() | changes)


def test_an_update_of_another_width_than_its_state_is_refused() -> None:
    state, x, matrix = torch.zeros(2, 6, 3), torch.zeros(6, 2), torch.zeros(6, 3)
    with pytest.raises(ValueError, match="x must be"):
        selective_state_update(state, x, x.mT, matrix, matrix, matrix)
