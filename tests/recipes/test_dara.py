"""DARA: factors on logits of groups of tokens, and a frozen model that learns nothing else."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from tests.support.formulas import follows
from torch import Tensor, nn

from foveate.catalogue.registry import mixer
from foveate.mixers.exact_io.flash_attention import FlashAttention
from foveate.recipes.dara import dara
from foveate.recipes.small_lm import SmallLM

DIM, HEADS, GROUPS, WIDTH = 12, 4, 2, 3
IMAGES = ((1, 4), (5, 8))


def formula(layer: nn.Module, x: Tensor, *, is_causal: bool = True) -> Tensor:
    batch, length, _ = x.shape
    q = (x @ layer.to_q.weight.T).view(batch, length, HEADS, WIDTH)
    k, v = ((x @ w.weight.T).view(batch, length, GROUPS, WIDTH) for w in (layer.to_k, layer.to_v))
    rows = []
    for b in range(batch):
        for i in range(length):
            for h in range(HEADS):
                g, logits = h // (HEADS // GROUPS), []
                seen = range(i + 1 if is_causal else length)
                for j in seen:
                    factor = next((layer.factors[h, n] for n, (a, e) in enumerate(IMAGES) if a <= j < e), 1.0)
                    logits.append(factor * (q[b, i, h] @ k[b, j, g]) / math.sqrt(WIDTH))
                rows.append(torch.stack(logits).softmax(0) @ v[b, : len(seen), g])
    return torch.stack(rows).view(batch, length, DIM) @ layer.to_out.weight.T


@pytest.mark.paper("DARA", "definition")
@pytest.mark.paper("DARA", "works_when")
@pytest.mark.parametrize("is_causal", [True, False])
def test_each_head_has_a_factor_for_each_group_before_the_softmax(is_causal: bool) -> None:
    layer = mixer("group_scaled_attention", DIM, heads=HEADS, kv_heads=GROUPS, groups=IMAGES, causal=is_causal).double()
    x = torch.randn(2, 11, DIM, dtype=torch.float64, requires_grad=True)
    follows(layer, lambda: layer(x), lambda: formula(layer, x, is_causal=is_causal), x)


@pytest.mark.paper("DARA", "works_when")
def test_the_student_begins_as_the_model_bit_for_bit() -> None:
    model, tokens = SmallLM(partial(FlashAttention, heads=4)), torch.randint(16, (3, 20))
    assert torch.equal(dara(images=((1, 7), (9, 14)), layers=2).prepare(model)(tokens), model(tokens))


def targets(student: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in student.named_parameters() if name.endswith("factors")]


@pytest.mark.paper("DARA", "works_when")
def test_training_finds_factors_and_leaves_the_base_as_it_is() -> None:
    """A model whose heads look at images by other factors speaks; the student, which has its weights, hears which."""
    model = SmallLM(partial(FlashAttention, heads=4), layers=1)
    with torch.no_grad():
        for mixing in model.mixers:
            mixing.to_q.weight.mul_(4)
            mixing.to_k.weight.mul_(4)
        model.head.weight.mul_(6)
    recipe = dara(images=((1, 7), (9, 14)))
    speaker, student = recipe.prepare(model), recipe.prepare(model)
    with torch.no_grad():
        targets(speaker)[0].copy_(torch.tensor([[1.8, 0.6], [0.5, 1.0], [1.0, 1.6], [1.4, 1.4]]))
    before = {name: value.clone() for name, value in student.named_parameters()}
    learned = [parameter for parameter in student.parameters() if parameter.requires_grad]
    assert [tuple(parameter.shape) for parameter in learned] == [(4, 2)]
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03)

    def loss(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            said = speaker(tokens).softmax(-1)
        return -(said * student(tokens).log_softmax(-1)).sum(-1).mean()

    for _ in range(120):
        optimizer.zero_grad()
        loss(torch.randint(16, (16, 20))).backward()
        optimizer.step()
    torch.testing.assert_close(targets(student)[0], targets(speaker)[0], rtol=0, atol=0.15)
    for name, value in student.named_parameters():
        assert name.endswith("factors") or torch.equal(value, before[name])


@pytest.mark.paper("DARA", "works_when")
def test_only_the_first_layers_are_given_factors() -> None:
    model = SmallLM(partial(FlashAttention, heads=4), layers=3)
    student = dara(images=((0, 5),), layers=2).prepare(model)
    assert [type(mixing).__name__ for mixing in student.mixers] == ["GroupScaledAttention"] * 2 + ["FlashAttention"]


def test_refusals_in_words() -> None:
    with pytest.raises(ValueError, match="do not overlap"):
        mixer("group_scaled_attention", 8, groups=((0, 4), (3, 6)))
    with pytest.raises(ValueError, match="at least 1"):
        dara(images=((0, 4),), layers=0)
    with pytest.raises(ValueError, match="no AttentionMixer"):
        dara(images=((0, 4),)).prepare(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="plain attention"):
        dara(images=((0, 4),)).prepare(SmallLM(partial(mixer_class(), heads=4)))


def mixer_class() -> type[nn.Module]:
    return type(mixer("ssa", 8, heads=2))
