"""Audio Mamba: the model written out, and what its backward scans are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.agreement import accuracy_after, alike
from tests.support.scan_formulas import agree, as_it_begins, both_ways, shaken
from torch import Tensor

from foveate.layouts.orders import Order
from foveate.mixers.recurrent_ssm.audio_mamba import BidirectionalMamba
from foveate.models.audio import audio_mamba_classifier
from foveate.patterns import Layout

SIZES: dict[str, Any] = {"dim": 12, "depth": 2, "state": 3, "patch": 4, "size": (8, 20)}


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@pytest.mark.paper("AuM (Audio Mamba)", "definition")
@pytest.mark.parametrize("begun", [as_it_begins, shaken])
def test_it_reads_a_class_token_in_the_middle_of_the_patches(begun: Any) -> None:
    model = begun(audio_mamba_classifier(5, **SIZES))
    images = torch.randn(2, 1, 8, 20, dtype=torch.float64, requires_grad=True)
    patches = [images[:, 0, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten(1) for i in range(2) for j in range(5)]
    weight, bias = model.embed.patches.weight.flatten(1), model.embed.patches.bias
    tokens = torch.stack([patch @ weight.mT + bias for patch in patches], 1) + model.embed.places.flatten(2).mT
    own = (model.token + model.token_place).expand(2, 1, -1)
    x = torch.cat([tokens[:, :5], own, tokens[:, 5:]], 1)
    for norm, block in zip(model.body.norms, model.body.mixers, strict=False):
        x = x + both_ways(block, rms(x, norm.weight))
    read = rms(x, model.body.norms[2].weight)[:, 5]
    agree(model, model(images), read @ model.head.weight.mT + model.head.bias, images)


def test_places_are_interpolated_for_other_lengths() -> None:
    model = shaken(audio_mamba_classifier(5, **SIZES))
    longer = torch.zeros(1, 1, 8, 40, dtype=torch.float64)
    places = (model.embed(longer) - model.embed.patches(longer))[0]
    assert places.shape == (12, 2, 10)
    assert places.amin() > 1.3 * model.embed.places.amin() and places.amax() < 1.3 * model.embed.places.amax()


class Forwards(BidirectionalMamba):
    """Without the scan backwards."""

    def __init__(self, dim: int, **sizes: Any) -> None:
        super().__init__(dim, **sizes)
        del self.passes[1]

    def orders(self, layout: Layout) -> list[Order]:
        return list(super().orders(layout))[:1]


@pytest.mark.paper("AuM (Audio Mamba)", "works_when")
def test_it_learns_what_scans_in_one_direction_cannot() -> None:
    """Are the two rows of patches alike? The class token stands between them, and scans forwards see the first only."""
    everywhere = slice(None)
    rows = ((slice(0, 4), everywhere), (slice(4, 8), everywhere))
    found = []
    for kind in (BidirectionalMamba, Forwards):
        torch.manual_seed(2)
        model = audio_mamba_classifier(2, dim=16, depth=2, state=4, patch=4, size=(8, 20))
        for layer in range(2):
            model.body.mixers[layer] = kind(16, state=4)
        found.append(accuracy_after(model, alike((8, 20), rows), steps=100, lr=3e-3))
    assert found[0] > 0.9 and found[1] < 0.65


def test_the_class_token_begins_small() -> None:
    model = audio_mamba_classifier(10, dim=4096, depth=0)
    for part in (model.token, model.token_place, model.head.weight):
        assert 0.0185 < part.std() < 0.0215
