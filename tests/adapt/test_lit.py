"""LiT's recipe on a small diffusion transformer: what is inherited, and that the student learns from its teacher."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, mse_loss, scaled_dot_product_attention
from torch.testing import assert_close

from foveate import Grid
from foveate.adapt.lit import distillation_loss, inherit
from foveate.mixers.base import join_heads, split_heads

DIM, SIDE, CHANNELS = 16, 6, 2


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 12).chunk(3, 1)
        return self.proj(join_heads(scaled_dot_product_attention(q, k, v, attn_mask=mask)))


class DiTBlock(nn.Module):
    """Attention and an MLP, each shifted, scaled and gated by the time step, as in DiT."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = SelfAttention(), nn.LayerNorm(DIM, elementwise_affine=False)
        self.first, self.second = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)
        self.condition = nn.Linear(DIM, 6 * DIM)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.condition(time).unsqueeze(1).chunk(6, -1)
        x = x + gate * self.attention(self.norm(x) * (1 + scale) + shift)
        hidden = self.norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.second(gelu(self.first(hidden)))


class DiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(CHANNELS, DIM), nn.Linear(DIM, 2 * CHANNELS)
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(2))

    def forward(self, images: Tensor, time: Tensor) -> Tensor:
        x = self.enter(images.flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x, time)
        return self.leave(x).transpose(1, 2).unflatten(2, (SIDE, SIDE))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.randn(4, CHANNELS, SIDE, SIDE)
    return noise + torch.linspace(-1, 1, SIDE), torch.randn(4, DIM), noise


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
