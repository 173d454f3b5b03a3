"""ZeroI2V: heads that look into neighbouring frames, adapters that fold away, and what both cost and learn."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.masked import masked
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, layer_norm
from torch.testing import assert_close

from foveate.catalogue import tiers
from foveate.recipes.zeroi2v import DualHeads, zeroi2v

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FRAMES, HEADS = 4, 5


def gathered(x: Tensor, frames: int, heads: int) -> Tensor:
    """Frame by frame and head by head: which frame a head reads."""
    rows = []
    for number in range(len(x)):
        t, own = number % frames, []
        for head in range(x.shape[1]):
            step = -1 if head < heads else 1 if head < 2 * heads else 0
            own.append(x[number + step, head] if 0 <= t + step < frames else x[number, head])
        rows.append(torch.stack(own))
    return torch.stack(rows)


@pytest.mark.paper("ZeroI2V", "definition")
@pytest.mark.paper("ZeroI2V", "works_when")
def test_heads_read_neighbouring_frames_and_ends_keep_their_own() -> None:
    heads = [torch.randn(2 * FRAMES, HEADS, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    q, k, v = heads
    found = DualHeads(FRAMES, 2)(q, k, v)
    expected = masked(q, gathered(k, FRAMES, 2), gathered(v, FRAMES, 2), torch.ones(7, 7, dtype=torch.bool))
    assert_close(found, expected)
    towards = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(y, heads, towards) for y in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


def teacher(**other: Any) -> Any:
    row: Any = tiers.row("zeroi2v")
    config = row.teacher().config
    for name, value in other.items():
        setattr(config, name, value)
    from transformers import ViTForImageClassification

    return ViTForImageClassification(config).eval()


def shaken(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def norm(x: Tensor, module: Any) -> Tensor:
    return layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)


def adapted(x: Tensor, adapter: Any) -> Tensor:
    inner = x @ adapter.fc1.weight.T + adapter.fc1.bias
    return x + 0.5 * (inner @ adapter.fc2.weight.T + adapter.fc2.bias)


def written_out(model: Any, videos: Tensor, frames: int, heads: int) -> Tensor:
    vit = model.image.vit
    pictures = videos.transpose(1, 2).flatten(0, 1)
    patches = vit.embeddings.patch_embeddings(pictures)
    x = torch.cat([vit.embeddings.cls_token.expand(len(patches), -1, -1), patches], 1)
    times = vit.embeddings.dropout[1].times.repeat(len(videos), 1)
    x = x + vit.embeddings.position_embeddings + times.unsqueeze(1)
    for layer in vit.layers:
        y, attention = adapted(norm(x, layer.layernorm_before[0]), layer.layernorm_before[1]), layer.attention
        split = [
            (y @ one.weight.T + one.bias).unflatten(-1, (3, -1)).transpose(1, 2)
            for one in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        k, v = (gathered(one, frames, heads) for one in split[1:])
        mixed = masked(split[0], k, v, torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)).transpose(1, 2).flatten(2)
        out = attention.o_proj
        x = x + adapted(mixed @ out[0].weight.T + out[0].bias, out[1])
        y = adapted(norm(x, layer.layernorm_after[0]), layer.layernorm_after[1])
        hidden = gelu(y @ layer.mlp.fc1.weight.T + layer.mlp.fc1.bias)
        x = x + hidden @ layer.mlp.fc2.weight.T + layer.mlp.fc2.bias
    read = norm(x[:, 0], vit.layernorm) @ model.image.classifier.weight.T + model.image.classifier.bias
    return read.unflatten(0, (-1, frames)).mean(1)


@pytest.mark.paper("ZeroI2V", "definition")
@pytest.mark.paper("ZeroI2V", "works_when")
def test_the_video_model_is_its_formula_with_adapters_and_without() -> None:
    recipe = zeroi2v(frames=FRAMES, share=1 / 3)
    videos = torch.randn(2, 1, FRAMES, 8, 8, dtype=torch.float64)
    model: Any = shaken(recipe.prepare(teacher().double()))
    found, expected = model(videos), written_out(model, videos, FRAMES, 1)
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
    learning = [parameter for name, parameter in model.named_parameters() if recipe.stages[0].trains(name)]
    towards = torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad(y, learning, towards) for y in (found, expected)), strict=True):
        assert_close(one, other, rtol=1e-7, atol=1e-9)
    plain = sum(parameter.numel() for parameter in teacher().parameters())
    model.fold()
    assert_close(model(videos), expected, rtol=1e-9, atol=1e-9)
    model.fold()
    assert_close(model(videos), expected, rtol=1e-9, atol=1e-9)
    assert sum(parameter.numel() for parameter in model.parameters()) == plain + FRAMES * 24, "the frames' embedding"


@pytest.mark.paper("ZeroI2V", "definition")
def test_adapters_begin_as_nothing_and_alone_learn() -> None:
    image, recipe = teacher().double(), zeroi2v(frames=FRAMES, share=1 / 3)
    student, still = recipe.prepare(image), torch.randn(2, 1, 1, 8, 8, dtype=torch.float64)
    assert_close(student(still.expand(-1, -1, FRAMES, -1, -1)), image(still.squeeze(2)).logits)
    trains = {name for name, _ in student.named_parameters() if recipe.stages[0].trains(name)}
    fixed = {name for name, _ in student.named_parameters()} - trains
    assert all(
        ".1.fc" in name or "times" in name or "vit.layernorm." in name or "classifier" in name for name in trains
    )
    assert sum(".1.fc" in name for name in trains) == 2 * 3 * 4 and any("mlp.fc1" in name for name in fixed)


@pytest.mark.paper("ZeroI2V", "works_when")
def test_folded_it_takes_the_time_of_the_image_model_and_of_the_copy() -> None:
    """As benchmarks/static_sparse.py measured it."""
    for case in json.loads((RESULTS / "static_sparse.json").read_text(encoding="utf-8"))["zeroi2v"]:
        image, copied, video = (case["seconds"][name] for name in ("image model", "copy of keys and values", "folded"))
        assert video < 1.05 * (image + copied) and copied < 0.1 * image


class Moving:
    """Marks that move left or right: frames alone do not tell which."""

    def images(self, batch: int) -> tuple[Tensor, Tensor]:
        column = torch.randint(4, (batch,))
        return self.frame(column), column

    def frame(self, column: Tensor) -> Tensor:
        image = 0.1 * torch.randn(len(column), 1, 8, 8)
        image[torch.arange(len(column)), 0, :, 2 * column] += 2
        return image

    def videos(self, batch: int) -> tuple[Tensor, Tensor]:
        left, way = torch.randint(3, (batch,)), torch.randint(2, (batch,))
        frames = [self.frame(left + 1 - way), self.frame(left + way)]
        return torch.stack(frames, 2), way


def learn(model: nn.Module, draw: Any, names: Any, steps: int, lr: float) -> float:
    parameters = [parameter for name, parameter in model.named_parameters() if names(name)]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for _ in range(steps):
        inputs, label = draw(32)
        out = model(inputs)
        loss = cross_entropy(getattr(out, "logits", out), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        inputs, label = draw(256)
        out = model(inputs)
        return (getattr(out, "logits", out).argmax(-1) == label).float().mean().item()


@pytest.mark.paper("ZeroI2V", "works_when")
def test_of_a_pretrained_image_model_it_learns_motion_better_than_of_none() -> None:
    torch.manual_seed(0)
    task, fresh = Moving(), teacher(patch_size=2, initializer_range=0.05)
    trained = copy.deepcopy(fresh)
    assert learn(trained, task.images, lambda name: True, 60, 3e-3) > 0.9
    recipe = zeroi2v(frames=2, share=1 / 3, hidden=1.0, scale=1.0)
    found = [learn(recipe.prepare(one), task.videos, recipe.stages[0].trains, 150, 3e-3) for one in (trained, fresh)]
    assert found[0] > 0.9 and found[0] > found[1] + 0.1, found


def test_other_shares_and_clips_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one and at most half of 3; got 0\.1"):
        zeroi2v(share=0.1).prepare(teacher())
    with pytest.raises(ValueError, match=r"videos are \(batch, channels, 8, height, width\)"):
        zeroi2v(share=1 / 3).prepare(teacher())(torch.randn(2, 1, 7, 8, 8))
