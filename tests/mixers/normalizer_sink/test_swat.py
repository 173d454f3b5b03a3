"""SWAT: sigmoid weights in a window, balanced slopes and rotary positions."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.formulas import follows
from tests.support.heads import heads, turned
from torch import Tensor

from foveate.catalogue.registry import mixer
from foveate.mixers.base import split_heads


@pytest.mark.paper("SWAT (LLM)", "definition")
@pytest.mark.paper("SWAT (LLM)", "works_when")
@pytest.mark.parametrize("half", [2, 3])
@pytest.mark.parametrize("rotary", [None, 30.0])
def test_swat_is_its_formula(half: int, rotary: float | None) -> None:
    model = mixer("swat", 16 * half, heads=2 * half, window=6, rotary=rotary).double()
    x, places = heads(2, 23, 16 * half), torch.arange(23)
    distance = places.unsqueeze(1) - places
    literal = {2: [0.5, 0.25, -0.5, -0.25], 3: [0.5, 0.25, 0.125, -0.5, -0.25, -0.125]}[half]
    slopes = torch.tensor(literal, dtype=torch.float64).view(-1, 1, 1)

    def formula() -> Tensor:
        q, k, v = (split_heads(layer(x), 2 * half) for layer in (model.to_q, model.to_k, model.to_v))
        q, k = (q, k) if rotary is None else (turned(y, places, rotary) for y in (q, k))
        weights = torch.sigmoid(q @ k.transpose(2, 3) / math.sqrt(8) - slopes * distance.abs())
        out = (weights * ((distance >= 0) & (distance < 6))) @ v
        return model.to_out(out.transpose(1, 2).flatten(2))

    follows(model, lambda: model(x), formula, x)


@pytest.mark.paper("SWAT (LLM)", "works_when")
@torch.no_grad()
def test_swat_decodes_from_a_cache_of_its_window() -> None:
    """As it reads, while what is kept, down to the storage, does not grow with the text."""
    model, x = mixer("swat", 32, heads=4, kv_heads=2, window=7).double(), torch.randn(1, 120, 32, dtype=torch.float64)
    state, outs, kept = model.init_state(1), [], []
    for token in x.split(1, dim=1):
        out, state = model.decode(token, state)
        outs.append(out)
        leaves = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in state.tokens.tensors}
        kept.append(sum(leaves.values()))
    torch.testing.assert_close(torch.cat(outs, 1), model(x))
    assert max(kept[60:]) == max(kept[:60]) == model.state_bytes(120) == model.state_bytes(10**6)
