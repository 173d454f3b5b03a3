"""QDSFormer's classical normalisers: rows and columns that sum to 1, by Sinkhorn's iterations and by a QR factor."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.formulas import follows
from torch import Tensor

from foveate import Packed, attend, causal, key_padding, qr_squared, sinkhorn, window
from foveate.catalogue.registry import mixer

DIM, HEADS, WIDTH = 18, 2, 9


def gram_schmidt(logits: Tensor) -> Tensor:
    """The orthogonal factor of (N, N), column by column."""
    columns: list[Tensor] = []
    for column in logits.unbind(1):
        for known in columns * 2:  # twice, for its digits
            column = column - (known @ column) * known
        columns.append(column / column.norm())
    return torch.stack(columns, 1)


def sinkhorn_table(logits: Tensor, iterations: int) -> Tensor:
    table = logits.exp()
    for step in range(iterations):
        table = table / table.sum(1 - step % 2, keepdim=True)
    return table


def weights_of(logits: Tensor, normaliser: str) -> Tensor:
    return sinkhorn_table(logits, 3) if normaliser == "sinkhorn" else gram_schmidt(logits) ** 2


def formula(layer: torch.nn.Module, x: Tensor, normaliser: str) -> Tensor:
    outs = []
    for b in range(len(x)):
        heads = []
        for h in range(HEADS):
            part = slice(h * WIDTH, (h + 1) * WIDTH)
            q, k, v = (x[b] @ w.weight[part].T for w in (layer.to_q, layer.to_k, layer.to_v))
            heads.append(weights_of(q @ k.T / math.sqrt(WIDTH), normaliser) @ v)
        outs.append(torch.cat(heads, -1) @ layer.to_out.weight.T)
    return torch.stack(outs)


@pytest.mark.paper("QDSFormer", "definition")
@pytest.mark.paper("QDSFormer", "works_when")
@pytest.mark.parametrize("normaliser", ["sinkhorn", "qr"])
def test_it_is_its_formula(normaliser: str) -> None:
    layer = mixer("doubly_stochastic_attention", DIM, heads=HEADS, normaliser=normaliser).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.linalg.qr(torch.randn_like(parameter)).Q)  # logits far from singular ones
    x = torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True)
    follows(layer, lambda: layer(x), lambda: formula(layer, x, normaliser), x, rtol=1e-6, atol=1e-6)


@pytest.mark.paper("QDSFormer", "works_when")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", ["sinkhorn", "qr"])
def test_rows_and_columns_sum_to_one(which: str, dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 3, 2, 7, 8, dtype=dtype)
    own = torch.eye(7, dtype=dtype).expand(3, 2, 7, 7)
    table = attend(q, k, own, weights=sinkhorn(401) if which == "sinkhorn" else qr_squared())
    for axis in (-1, -2):
        ones = torch.ones(3, 2, 7, dtype=dtype)
        torch.testing.assert_close(table.sum(axis), ones, rtol=0, atol=1e-9 if dtype == torch.float64 else 1e-5)
    assert table.min() >= 0


@pytest.mark.paper("QDSFormer", "works_when")
@pytest.mark.parametrize("which", ["sinkhorn", "qr"])
def test_sums_of_one_have_no_gradient_and_the_table_has(which: str) -> None:
    q, k = (torch.randn(1, 1, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = sinkhorn(201) if which == "sinkhorn" else qr_squared()
    table = attend(q, k, torch.eye(5, dtype=torch.float64).view(1, 1, 5, 5), weights=weights)
    for sums in (table.sum(-1), table.sum(-2)):
        found = torch.autograd.grad(sums, (q, k), torch.randn_like(sums), retain_graph=True)
        assert all(gradient.abs().max() < 1e-7 for gradient in found)
    assert torch.autograd.grad(table.square().sum(), q)[0].abs().max() > 1e-4


def test_qr_of_padding_and_packs_is_that_of_each_text_alone() -> None:
    q, k, v = torch.randn(3, 2, 2, 9, 9, dtype=torch.float64).unbind(0)
    packed = attend(q, k, v, weights=qr_squared(), layout=Packed([4, 5]))
    real = torch.tensor([[True] * 6 + [False] * 3, [False, True, True, False] + [True] * 5])
    padded = attend(q, k, v, key_padding(real), weights=qr_squared())
    for text in (slice(0, 4), slice(4, 9)):
        alone = attend(*(x[:, :, text] for x in (q, k, v)), weights=qr_squared())
        torch.testing.assert_close(packed[:, :, text], alone)
    for entry in range(2):
        alone = attend(*(x[entry : entry + 1, :, real[entry]] for x in (q, k, v)), weights=qr_squared())
        torch.testing.assert_close(padded[entry : entry + 1, :, real[entry]], alone)


def test_what_is_not_finite_stays_in_its_text() -> None:
    q, k, v = torch.randn(3, 1, 1, 7, 8).unbind(0)
    clean = attend(q, k, v, weights=qr_squared(), layout=Packed([3, 4]))
    q[0, 0, 1, 0] = torch.nan
    out = attend(q, k, v, weights=qr_squared(), layout=Packed([3, 4]))
    assert out[:, :, :3].isnan().all()
    torch.testing.assert_close(out[:, :, 3:], clean[:, :, 3:])


def test_refusals_in_words() -> None:
    q, k, v = torch.randn(3, 1, 1, 7, 4).unbind(0)
    with pytest.raises(ValueError, match="7 tokens need as many channels of a head, not 4"):
        attend(q, k, v, weights=qr_squared())
    attend(q, k, v, weights=qr_squared(), bias=torch.randn(7, 7))  # which makes the rank full
    wide = torch.randn(1, 1, 7, 8)
    with pytest.raises(ValueError, match="would not be causal"):
        attend(wide, wide, wide, causal, weights=qr_squared())
    with pytest.raises(ValueError, match="as many queries as keys"):
        attend(wide[:, :, :3], wide, wide, weights=qr_squared())
    with pytest.raises(ValueError, match="own document"):
        attend(wide, wide, wide, window(2), weights=qr_squared())
    with pytest.raises(ValueError, match="normaliser"):
        mixer("doubly_stochastic_attention", 8, heads=1, normaliser="lu")
