"""Recipes beside the same student that inherits nothing: as many steps, on the same batches, judged on others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from foveate.catalogue.contracts import Recipe
from foveate.mixers.exact_io.flash_attention import FlashAttention
from foveate.mixers.recurrent_ssm.rwkv7 import RWKV7
from foveate.recipes.conversion import next_token_loss
from foveate.recipes.linearise import linearise
from foveate.recipes.lit import lit
from foveate.recipes.small_dit import SelfAttention, SmallDiT
from foveate.recipes.small_lm import SmallLM
from foveate.recipes.state_tuning import tune_state


def train(model: nn.Module, loss: Callable[[Any], Tensor], batch: Callable[[], Any], steps: int, lr: float) -> None:
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(batch()).backward()
        optimizer.step()


def taught(
    recipe: Recipe,
    start: nn.Module,
    teacher: nn.Module,
    batch: Callable[[], Any],
    steps: int,
    lr: float,
) -> nn.Module:
    """What becomes of ``start`` by the recipe, its teacher another."""
    student, (stage,) = recipe.prepare(start), recipe.stages
    assert {name for name, p in student.named_parameters() if p.requires_grad} == {
        name for name, _ in student.named_parameters() if stage.trains(name)
    }
    train(student, lambda given: stage.loss(student, teacher, given), batch, steps, lr)
    return student.eval()


def images(count: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Stripes of a slope told by the time's place, under noise."""
    noise, time = torch.randn(count, 2, 6, 6), torch.randn(count, 16)
    return noise + time[:, :2, None, None] * torch.linspace(-2, 2, 6), time, noise


def noise_error(model: nn.Module, batches: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return sum(mse_loss(model(x, time)[:, :2], noise).item() for x, time, noise in batches) / len(batches)


@pytest.mark.paper("LiT", "works_when")
def test_a_linear_dit_that_inherits_learns_more_than_one_that_does_not() -> None:
    torch.manual_seed(0)
    teacher = SmallDiT()
    train(teacher, lambda given: mse_loss(teacher(*given[:2])[:, :2], given[2]), images, 250, 3e-3)
    unseen, recipe = [images(64) for _ in range(4)], lit(SelfAttention)
    heir, stranger = (
        taught(recipe, start, teacher.eval(), images, 50, 3e-3) for start in (copy.deepcopy(teacher), SmallDiT())
    )
    assert noise_error(teacher, unseen) < 0.5
    assert noise_error(heir, unseen) < 0.8 * noise_error(stranger, unseen)


def sentences(count: int = 16, length: int = 24) -> Tensor:
    """Each token tells the next by a table, but for one in ten."""
    table = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    tokens = torch.randint(16, (count, length))
    for place in range(1, length):
        told = table[(tokens[:, place - 1] + tokens[:, max(place - 2, 0)]) % 16]
        tokens[:, place] = torch.where(torch.rand(count) < 0.9, told, tokens[:, place])
    return tokens


def text_loss(model: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        return sum(next_token_loss(model, model, tokens).item() for tokens in batches) / len(batches)


@pytest.mark.paper("Linearized-LLM", "works_when")
def test_a_linearised_model_that_inherits_learns_more_than_one_that_does_not() -> None:
    torch.manual_seed(0)
    teacher = SmallLM(partial(FlashAttention, heads=4, rotary=100.0))
    train(teacher, lambda tokens: next_token_loss(teacher, teacher, tokens), sentences, 250, 3e-3)
    unseen, recipe = [sentences(64) for _ in range(2)], linearise(width=4)
    fresh = SmallLM(partial(FlashAttention, heads=4, rotary=100.0))
    heir, stranger = (taught(recipe, start, teacher.eval(), sentences, 40, 3e-3) for start in (teacher, fresh))
    before = recipe.prepare(teacher).eval()
    for name in ("to_q", "to_k", "to_v", "to_out"):
        kept = (getattr(model.mixers[1], name).weight for model in (before, teacher))  # type: ignore[index]
        torch.testing.assert_close(*kept, rtol=0, atol=0)
    assert text_loss(heir, unseen) < 0.8 * text_loss(stranger, unseen)
    assert text_loss(heir, unseen) < text_loss(before, unseen)


def dialects(count: int = 16, length: int = 8, *, first: float = 0.5) -> Tensor:
    """Each token tells the next by one of two tables, which is the same for a sentence; the first's share is given."""
    tables = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    table = tables[(torch.rand(count) >= first).long()]
    tokens = torch.randint(16, (count, length))
    for place in range(1, length):
        tokens[:, place] = table.gather(1, tokens[:, place - 1 : place]).squeeze(1)
    return tokens


@pytest.mark.paper("State-Tuning", "works_when")
@pytest.mark.parametrize("features", [None, 12])
def test_states_that_are_tuned_tell_a_trained_model_which_dialect_it_reads(features: int | None) -> None:
    """All its other weights stay; the states of a model that inherits none of them say next to nothing."""
    torch.manual_seed(0)
    teacher = SmallLM(partial(RWKV7, heads=4))
    train(teacher, lambda tokens: next_token_loss(teacher, teacher, tokens), dialects, 150, 1e-2)
    one = partial(dialects, first=1.0)
    recipe, unseen, fresh = tune_state(features=features), [one(256)], SmallLM(partial(RWKV7, heads=4))
    before = recipe.prepare(teacher).eval()
    heir, stranger = (taught(recipe, start, teacher.eval(), one, 40, 0.03) for start in (teacher, fresh))
    kept = {name: value for name, value in teacher.state_dict().items() if not name.endswith(".initial")}
    for name, value in kept.items():
        torch.testing.assert_close(heir.state_dict()[name], value, rtol=0, atol=0)
    assert text_loss(heir, unseen) < 0.95 * text_loss(before, unseen)
    assert text_loss(heir, unseen) < 0.6 * text_loss(stranger, unseen)
