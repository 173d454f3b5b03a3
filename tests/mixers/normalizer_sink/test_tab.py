"""TAB: what the class token reads, gated, and edited by a user."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.formulas import follows
from torch import Tensor

from foveate.catalogue.registry import mixer

DIM = 10


def formula(tab: torch.nn.Module, x: Tensor, context: Tensor) -> Tensor:
    """Row by row; the first row times one minus its first weight."""
    rows = []
    for b in range(len(x)):
        for i in range(x.shape[1]):
            q = tab.to_q.weight @ x[b, i]
            logits = torch.stack([q @ (tab.to_k.weight @ key) for key in context[b]]) / math.sqrt(DIM)
            weights = logits.exp() / logits.exp().sum()
            if i == 0:
                weights = weights * (1 - weights[0])
            rows.append(
                tab.to_out.weight @ sum(w * (tab.to_v.weight @ y) for w, y in zip(weights, context[b], strict=True))
            )
    return torch.stack(rows).view(x.shape)


@pytest.mark.paper("TAB", "definition")
@pytest.mark.parametrize("length", [None, 4])
def test_it_is_its_formula(length: int | None) -> None:
    tab = mixer("attention_bottleneck", DIM).double()
    x = torch.randn(2, 7, DIM, dtype=torch.float64, requires_grad=True)
    context = None if length is None else torch.randn(2, length, DIM, dtype=torch.float64, requires_grad=True)
    inputs = [x] if context is None else [x, context]
    follows(tab, lambda: tab(x, context=context), lambda: formula(tab, x, x if context is None else context), *inputs)


@pytest.mark.paper("TAB", "works_when")
def test_a_look_returns_output_and_weights_whose_sum_is_between_zero_and_one() -> None:
    tab = mixer("attention_bottleneck", DIM).double()
    x, context = torch.randn(3, 5, DIM, dtype=torch.float64), torch.randn(3, 8, DIM, dtype=torch.float64)
    out, attention = tab.look(x, context)
    assert attention.shape == (3, 8)
    assert ((attention.sum(-1) > 0) & (attention.sum(-1) < 1)).all()
    torch.testing.assert_close(out, tab(x, context=context)[:, 0])
    logits = torch.einsum("bc,bmc->bm", x[:, 0] @ tab.to_q.weight.T, context @ tab.to_k.weight.T) / math.sqrt(DIM)
    plain = logits.softmax(-1)
    torch.testing.assert_close(attention, plain * (1 - plain[:, :1]))


@pytest.mark.paper("TAB", "works_when")
def test_where_the_class_token_takes_everything_nothing_passes() -> None:
    tab = mixer("attention_bottleneck", DIM).double()
    with torch.no_grad():
        tab.to_q.weight.copy_(30 * torch.eye(DIM))
        tab.to_k.weight.copy_(torch.eye(DIM))
    x = torch.randn(1, 6, DIM, dtype=torch.float64)
    x[:, 1:] -= (x[:, 1:] * x[:, :1]).sum(-1, keepdim=True) * x[:, :1] / x[:, :1].square().sum()  # orthogonal to it
    x[:, 0] *= 5 / x[:, 0].norm()
    out, attention = tab.look(x)
    assert attention.sum() < 1e-12
    assert out.abs().max() < 1e-12
    assert tab(x)[:, 0].abs().max() < 1e-12
    assert tab(x)[:, 1:].abs().max() > 1e-3


@pytest.mark.paper("TAB", "works_when")
def test_attention_edited_to_zero_gives_exactly_zero_and_other_edits_what_they_say() -> None:
    tab = mixer("attention_bottleneck", DIM)
    x, context = torch.randn(2, 5, DIM), torch.randn(2, 7, DIM)
    assert torch.equal(tab.look(x, context, attention=torch.zeros(2, 7)).out, torch.zeros(2, DIM))
    edited = torch.zeros(2, 7)
    edited[:, 3] = 0.5
    out, attention = tab.look(x, context, attention=edited)
    assert torch.equal(attention, edited)
    expected = 0.5 * context[:, 3] @ tab.to_v.weight.T @ tab.to_out.weight.T
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="a weight a key"):
        tab.look(x, context, attention=torch.zeros(2, 6))
