"""LiT's recipe on a small diffusion transformer: what is inherited, and that the student learns from its teacher."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.testing import assert_close

from foveate import Grid
from foveate.recipes.lit import distillation_loss, inherit, lit
from foveate.recipes.small_dit import CHANNELS, DIM, SIDE, SelfAttention
from foveate.recipes.small_dit import SmallDiT as DiT
from foveate.recipes.small_dit import noisy_images as batch


@pytest.mark.paper("LiT", "works_when")
def test_all_weights_but_the_attentions_are_inherited() -> None:
    teacher = DiT().double()
    student = copy.deepcopy(teacher)
    assert inherit(student, SelfAttention, heads=1) == ["blocks.0.attention", "blocks.1.attention"]
    before, after = teacher.state_dict(), student.state_dict()
    kept = {name for name in before if ".attention." not in name}
    assert kept == {name for name in after if ".attention." not in name}
    for name in kept:
        assert_close(after[name], before[name], rtol=0, atol=0)
    mixer = student.blocks[1].attention.mixer
    assert mixer.heads == 1 and mixer.weight.dtype == torch.float64
    x = torch.randn(2, SIDE**2, DIM).double()
    assert_close(student.blocks[1].attention(x), mixer(x, layout=Grid(SIDE, SIDE)))
    assert_close(student.blocks[1].attention(x[:, 1:]), mixer(x[:, 1:]))


def test_the_recipe_leaves_its_teacher_as_it_is() -> None:
    teacher = DiT()
    student = lit(SelfAttention, heads=1).prepare(teacher)
    assert isinstance(teacher.blocks[0].attention, SelfAttention)
    assert student.blocks[0].attention.mixer.heads == 1


def test_attentions_may_be_named() -> None:
    student = DiT()
    assert inherit(student, lambda name, module: name == "blocks.1.attention") == ["blocks.1.attention"]
    assert isinstance(student.blocks[0].attention, SelfAttention)


def test_what_cannot_be_linear_is_refused() -> None:
    student = DiT()
    with pytest.raises(ValueError, match="no module"):
        inherit(student, nn.MultiheadAttention)
    with pytest.raises(ValueError, match="no linear layer"):
        inherit(student, nn.LayerNorm)
    inherit(student, SelfAttention)
    x = torch.randn(1, 9, DIM)
    with pytest.raises(ValueError, match="no mask"):
        student.blocks[0].attention(x, mask=torch.ones(9, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="noise and variance"):
        distillation_loss(torch.randn(1, 2, 3, 3), torch.randn(1, 4, 3, 3), torch.randn(1, 2, 3, 3))


@pytest.mark.paper("LiT", "works_when")
def test_the_loss_is_noise_and_both_of_the_teachers_opinions() -> None:
    student, teacher = (torch.randn(3, 4, 5, 5, requires_grad=True) for _ in range(2))
    noise = torch.randn(3, 2, 5, 5)
    loss = distillation_loss(student, teacher, noise, noise_weight=0.3, variance_weight=0.7)
    expected = mse_loss(student[:, :2], noise)
    expected = (
        expected + 0.3 * mse_loss(student[:, :2], teacher[:, :2]) + 0.7 * mse_loss(student[:, 2:], teacher[:, 2:])
    )
    assert_close(loss, expected)
    loss.backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.paper("LiT", "works_when")
def test_the_student_learns_noise_and_variance_from_its_teacher() -> None:
    teacher = DiT().eval()
    student = copy.deepcopy(teacher)
    inherit(student, SelfAttention)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    unseen = [batch() for _ in range(8)]
    before = apart(student, teacher, unseen)
    for _ in range(80):
        images, time, _ = batch()
        with torch.no_grad():
            wanted = teacher(images, time)
        loss = distillation_loss(student(images, time), wanted, wanted[:, :CHANNELS], variance_weight=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert apart(student, teacher, unseen) < 0.6 * before


@torch.no_grad()
def apart(student: DiT, teacher: DiT, batches: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    return sum(mse_loss(student(images, time), teacher(images, time)).item() for images, time, _ in batches)
