"""Long documents: both designs as dense computations, and what reading more is worth to them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from tests.support.formulas import follows
from tests.support.masked import masked_mixer
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from foveate.catalogue import tiers
from foveate.lab.probes.long_documents import CLASSES, Hierarchy, LocalGlobal, documents_of


def layer(module: Any, x: Tensor, seen: Tensor) -> Tensor:
    def norm(y: Tensor, own: Any) -> Tensor:
        return layer_norm(y, y.shape[-1:], own.weight, own.bias)

    x = x + masked_mixer(module.attention, norm(x, module.norm), seen)
    first, _, second = module.mlp
    y = norm(x, module.mlp_norm) @ first.weight.T + first.bias
    return x + gelu(y) @ second.weight.T + second.bias


@pytest.mark.paper("TrLDC study", "definition")
@pytest.mark.paper("TrLDC study", "works_when")
def test_windows_with_a_global_token_are_a_mask() -> None:
    model, tokens = LocalGlobal(16, 2, 2, reach=3).double(), torch.randint(24, (2, 21))
    seen = torch.tensor([[abs(i - j) <= 3 or 0 in (i, j) for j in range(22)] for i in range(22)])

    def written_out() -> Tensor:
        x = torch.cat([model.first.expand(2, -1, -1), model.embed.weight[tokens]], 1)
        for module in model.layers:
            x = layer(module, x, seen)
        return x[:, 0] @ model.head.weight.T + model.head.bias

    follows(model, lambda: model(tokens), written_out)


@pytest.mark.paper("TrLDC study", "definition")
@pytest.mark.paper("TrLDC study", "works_when")
def test_a_hierarchy_reads_segments_and_then_what_it_read() -> None:
    model, tokens = Hierarchy(16, 2, 2, segment=5).double(), torch.randint(24, (2, 20))

    def written_out() -> Tensor:
        read = []
        for first in range(0, 20, 5):
            x = torch.cat([model.first.expand(2, -1, -1), model.embed.weight[tokens[:, first : first + 5]]], 1)
            for module in model.segments:
                x = layer(module, x, torch.ones(6, 6, dtype=torch.bool))
            read.append(x[:, 0])
        x = torch.cat([model.last.expand(2, -1, -1), torch.stack(read, 1)], 1)
        for module in model.document:
            x = layer(module, x, torch.ones(5, 5, dtype=torch.bool))
        return x[:, 0] @ model.head.weight.T + model.head.bias

    follows(model, lambda: model(tokens), written_out)
    with pytest.raises(ValueError, match="segments of 5 tokens; got 19"):
        model(tokens[:, :19])


def test_documents_have_more_words_of_their_subject_than_of_others() -> None:
    words, label = documents_of(200, 40, torch.Generator().manual_seed(1))
    counts = torch.stack([(words == subject).sum(1) for subject in range(CLASSES)], 1)
    assert torch.equal(counts.argmax(1), label) and torch.equal(counts.sum(1), torch.full((200,), 7))


@pytest.mark.paper("TrLDC study", "works_when")
def test_both_designs_learn_and_gain_from_longer_text() -> None:
    row: Any = tiers.row("long_documents")
    found = row.run(0)
    assert found.verdict == "confirmed", found.figures
    assert min(found.figures["local, all"], found.figures["hierarchy, all"]) > 0.8, found.figures


@pytest.mark.parametrize(("quarter", "verdict"), [(0.55, "refuted"), (0.45, "confirmed")])
def test_a_gain_is_a_tenth_of_the_documents(quarter: float, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("foveate.lab.probes.long_documents")
    monkeypatch.setattr(module, "accuracy", lambda model, length, read, *_: 0.58 if read == length else quarter)
    assert module.long_documents(0).verdict == verdict
