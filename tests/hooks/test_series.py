"""Applications to time series: priors of tokens and of pairs, against weights multiplied one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate.adapt import as_core
from foveate.catalogue import tiers
from foveate.catalogue.contracts import Hook


def hook(**priors: Tensor) -> Hook:
    row = tiers.row("vsformer")
    assert isinstance(row, tiers.HookRow)
    return row.make(**priors)


@pytest.mark.paper("VSFormer", "definition")
@pytest.mark.paper("VSFormer", "works_when")
@pytest.mark.parametrize("given", [("prior",), ("pairs",), ("prior", "pairs")])
def test_priors_of_tokens_and_of_pairs_multiply_weights_by_their_exponentials(given: tuple[str, ...]) -> None:
    prior, pairs = torch.randn(11, dtype=torch.float64), torch.randn(11, 11, dtype=torch.float64)
    found = hook(**{name: value for name, value in (("prior", prior), ("pairs", pairs)) if name in given})
    q, k, v = (torch.randn(2, found.heads, 11, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    rows = []
    for i in range(11):
        weights = []
        for j in range(11):
            told = (prior[j] if "prior" in given else 0) + (pairs[i, j] if "pairs" in given else 0)
            weights.append(torch.exp((q[:, :, i] * k[:, :, j]).sum(-1) / math.sqrt(6) + told))
        table = torch.stack(weights, -1)
        rows.append(torch.einsum("bhj,bhjd->bhd", table / table.sum(-1, keepdim=True), v))
    expected = torch.stack(rows, 2)
    assert found.bias is not None
    out = as_core(found.operator)(q, k, v, bias=found.bias)
    torch.testing.assert_close(out, expected)
    towards = torch.randn_like(out)
    for one, other in zip(*(torch.autograd.grad(y, (q, k, v), towards) for y in (out, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_refusals_in_words() -> None:
    assert hook().keys == 100
    with pytest.raises(ValueError, match=r"\(5, 5\)"):
        hook(prior=torch.zeros(5), pairs=torch.zeros(5, 4))
