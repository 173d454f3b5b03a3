"""SHViT: the backbone written out with a dense table of weights, and what was measured of its one head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.formulas import follows
from torch import Tensor, nn
from torch.nn.functional import conv2d

from foveate.models.vision import shvit
from foveate.models.vision.shvit import SingleHeadAttention

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
SIZES: dict[str, Any] = {"dims": (16, 24, 32), "depths": (1, 2, 1), "parts": (4, 7, 6)}


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    """A batch norm at rest: its running mean and variance."""
    shape = (1, -1) + (1,) * (x.dim() - 2)
    mean, variance, weight, bias = (
        y.view(shape) for y in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def conv(x: Tensor, layer: nn.Module, **options: Any) -> Tensor:
    return normed(conv2d(x, layer[0].weight, **options), layer[1])


def depthwise(x: Tensor, layer: nn.Module, stride: int = 1) -> Tensor:
    return conv(x, layer, stride=stride, padding=1, groups=x.shape[1])


def mlp(x: Tensor, layer: nn.Module) -> Tensor:
    return conv(conv(x, layer[0]).relu(), layer[2])


def single_head(x: Tensor, layer: nn.Module, part: int) -> Tensor:
    own, rest = x[:, :part], x[:, part:]
    mean = own.mean((1, 2, 3), keepdim=True)
    own = (own - mean) / torch.sqrt(((own - mean) ** 2).mean((1, 2, 3), keepdim=True) + 1e-5)
    own = own * layer.norm.weight.view(1, -1, 1, 1) + layer.norm.bias.view(1, -1, 1, 1)
    mixed = conv(own, layer.to_qkv).flatten(2)
    q, k, v = mixed[:, :16], mixed[:, 16:32], mixed[:, 32:]
    weights = (torch.einsum("bci,bcj->bij", q, k) / 4).softmax(-1)
    read = torch.einsum("bij,bcj->bci", weights, v).unflatten(2, x.shape[2:])
    return conv(torch.cat([read, rest], 1).relu(), layer.to_out)


def formula(model: nn.Module, x: Tensor) -> Tensor:
    stem, first = list(model.stages[0])[:7], list(model.stages[0])[7:]
    for index in range(0, 7, 2):
        x = conv(x, stem[index], stride=2, padding=1)
        x = x.relu() if index < 6 else x
    for stage, blocks in enumerate([first, list(model.stages[1]), list(model.stages[2])]):
        if stage:
            before, merge, after = blocks[:3]
            x = x + depthwise(x, before[0].inner)
            x = x + mlp(x, before[1].inner)
            x = conv(x, merge[0]).relu()
            x = depthwise(x, merge[2], stride=2).relu()
            said = conv2d(x.mean((2, 3), keepdim=True), merge[4].first.weight, merge[4].first.bias).relu()
            x = x * conv2d(said, merge[4].second.weight, merge[4].second.bias).sigmoid()
            x = conv(x, merge[5])
            x = x + depthwise(x, after[0].inner)
            x = x + mlp(x, after[1].inner)
            blocks = blocks[3:]
        for block in blocks:
            x = x + depthwise(x, block[0].inner)
            x = x + single_head(x, block[1].inner, SIZES["parts"][stage]) if stage else x
            x = x + mlp(x, block[-1].inner)
    return normed(x.mean((2, 3)), model.norm) @ model.head.weight.T + model.head.bias


def rested(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics that are not those at the start."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)
    return model.double().eval()


@pytest.mark.paper("SHViT", "definition")
def test_the_backbone_is_the_papers_written_out() -> None:
    model = rested(shvit(5, **SIZES))
    images = torch.randn(2, 3, 70, 101, dtype=torch.float64, requires_grad=True)
    follows(model, lambda: model(images), lambda: formula(model, images), images)


@pytest.mark.paper("SHViT", "definition")
@pytest.mark.paper("SHViT", "works_when")
def test_one_head_reads_a_part_and_the_rest_passes() -> None:
    """Queries and keys of 16 channels, values as wide as the part; the other channels know one pixel each."""
    layer = rested(SingleHeadAttention(20, 9))
    assert layer.to_qkv[0].weight.shape == (41, 9, 1, 1)
    x = torch.randn(2, 20, 5, 7, dtype=torch.float64, requires_grad=True)
    follows(layer, lambda: layer(x), lambda: single_head(x, layer, 9), x)
    with torch.no_grad():
        layer.to_out[0].weight.copy_(torch.eye(20).view(20, 20, 1, 1))
    (gradient,) = torch.autograd.grad(layer(x)[0, 9:, 2, 3].sum(), x)
    others = gradient.clone()
    others[0, 9:, 2, 3] = 0
    assert not others.any()


@pytest.mark.paper("SHViT", "works_when")
def test_heads_of_sixteen_channels_were_measured_cheaper_than_padded_ones() -> None:
    cases = json.loads((RESULTS / "shvit.json").read_text(encoding="utf-8"))["cases"]
    found = [case["seconds"] for case in cases if case["task"] == "attention by channels of keys"]
    assert len(found) == 2
    assert all(seconds["16"] < 0.75 * seconds["64"] for seconds in found)


@pytest.mark.paper("SHViT", "works_when")
def test_latency_of_s1_was_measured_beside_heads_on_all_channels() -> None:
    cases = json.loads((RESULTS / "shvit.json").read_text(encoding="utf-8"))["cases"]
    found = {case["side"]: case["seconds"] for case in cases if case["task"] == "S1"}
    assert set(found) == {224, 512}
    assert all(0 < seconds["single head"] < seconds["multi head"] for seconds in found.values())


def test_refusals_in_words() -> None:
    with pytest.raises(ValueError, match="some of the 8 channels"):
        SingleHeadAttention(8, 9)


def test_patches_double_their_channels_four_times_and_blocks_start_as_the_identity() -> None:
    model = shvit(5, dims=(16, 24, 40), depths=(2, 1, 2), parts=(4, 6, 8)).eval()
    convs = [part for part in model.stages[0].modules() if isinstance(part, nn.Conv2d) and part.stride == (2, 2)]
    assert [conv.out_channels for conv in convs] == [2, 4, 8, 16]
    for stage, (dim, depth) in enumerate(zip((16, 24, 40), (2, 1, 2), strict=True)):
        x = torch.randn(1, dim, 5, 7)
        for block in model.stages[stage][-depth:]:
            torch.testing.assert_close(block(x), x)
