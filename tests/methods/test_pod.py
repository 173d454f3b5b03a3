"""PoD: layers of a group share distant keys, against one softmax over near and distant scores written out."""

from __future__ import annotations

import pytest
import torch
from tests.support.llama_by_hand import logits, turned
from tests.support.small_models import small_model
from torch import Tensor

from foveate.catalogue import tiers

pytest.importorskip("transformers")
SINKS, WINDOW, LENGTH = 2, 6, 47


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def by_hand(scores: bool):
    asked: dict[int, tuple[Tensor, Tensor]] = {}

    def heads_out(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        at = torch.arange(LENGTH)
        q, k = turned(q, at), turned(k, at)
        asked[layer] = (q, k)
        far_q, far_k = asked[0]
        near = (at[:, None] - at < WINDOW) | (at < SINKS)
        logit = torch.where(near, q @ k.mT, (far_q if scores else q) @ far_k.mT) * 8**-0.5
        return logit.masked_fill(at[:, None] < at, float("-inf")).softmax(-1) @ v

    return heads_out


@pytest.mark.paper("PoD", "definition")
@pytest.mark.paper("PoD", "works_when")
@pytest.mark.parametrize("scores", [False, True], ids=["keys", "scores"])
@pytest.mark.parametrize("cuts", [[LENGTH], [23] + [1] * 24, [9, 20, 1, 12, 5]])
def test_near_tokens_by_own_keys_and_distant_ones_by_the_groups(cuts: list[int], scores: bool) -> None:
    model, tokens = small_model("llama"), torch.randint(1, 50, (LENGTH,))
    want = logits(model, tokens, by_hand(scores))
    change = tiers.row("pod").make(groups=[[1, 0]], sinks=SINKS, window=WINDOW, scores=scores).install(model)
    try:
        cache, got = None, []
        for part in tokens.split(cuts):
            out = model(part[None], past_key_values=cache)
            cache = out.past_key_values
            got.append(out.logits[0])
    finally:
        change.undo()
    torch.testing.assert_close(torch.cat(got), want, atol=1e-5, rtol=1e-5)  # transformers' angles are float32
    lower, upper = cache.layers
    assert lower.keys.shape[2] == LENGTH
    assert upper.keys.shape[2] <= SINKS + WINDOW
    assert upper.memory.values.length == LENGTH


@pytest.mark.paper("PoD", "definition")
@pytest.mark.paper("PoD", "works_when")
@pytest.mark.parametrize("groups", [[], [[0], [1]]])
@pytest.mark.parametrize("cuts", [[LENGTH], [23] + [1] * 24])
def test_groups_of_one_layer_are_full_attention(groups: list[list[int]], cuts: list[int]) -> None:
    """However near ends (here at a query's own token), the whole text and token by token."""
    model, tokens = small_model("llama"), torch.randint(1, 50, (2, LENGTH))
    want = model(tokens).logits
    change = tiers.row("pod").make(groups=groups, sinks=0, window=1).install(model)
    try:
        cache, got = None, []
        for part in tokens.split(cuts, dim=1):
            out = model(part, past_key_values=cache)
            cache = out.past_key_values
            got.append(out.logits)
    finally:
        change.undo()
    torch.testing.assert_close(torch.cat(got, 1), want)


@pytest.mark.paper("PoD", "works_when")
def test_a_group_saves_the_distant_keys_of_all_layers_but_its_lowest() -> None:
    model, tokens = small_model("llama"), torch.randint(1, 50, (1, 200))
    change = tiers.row("pod").make(groups=[[0, 1]], sinks=SINKS, window=WINDOW).install(model)
    try:
        cache = None
        for part in tokens.split([150] + [1] * 50, dim=1):
            cache = model(part, past_key_values=cache).past_key_values
    finally:
        change.undo()
    lower, upper = cache.layers
    assert lower.keys.shape[2] == lower.values.shape[2] == 200
    room = upper.keys.untyped_storage().nbytes() // upper.keys[:, :, 0].nbytes
    assert upper.keys.shape[2] <= room <= SINKS + WINDOW + 1
    values = upper.memory.values.tensors[0]
    assert values.shape[2] == 200
    assert not torch.equal(values, lower.values)


def test_a_layer_is_in_one_group() -> None:
    with pytest.raises(ValueError, match="one group"):
        tiers.row("pod").make(groups=[[0, 1], [1, 2]])


def test_a_model_has_the_layers_of_its_groups() -> None:
    model = small_model("llama")
    change = tiers.row("pod").make(groups=[[0, 99]]).install(model)
    with pytest.raises(ValueError, match="layers 0 to 1"):
        model(torch.arange(1, 5).view(1, 4))
    change.undo()
