"""Agent attention against its formula, in images and inside pretrained models."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.support.formulas import shaken
from tests.support.heads import agree, heads, join, plain, split
from torch import Tensor
from torch.nn import functional as F

from foveate import Grid, causal, key_padding
from foveate.mixers.lowrank_pool.agent import AgentAttention, AgentCore


@pytest.mark.paper("Agent Attention", "definition")
@pytest.mark.parametrize("grid", [Grid(8, 6), Grid(5, 7), None])
def test_agent_attention_is_its_formula(grid: Grid | None) -> None:
    model, x = (
        shaken(AgentAttention(32, heads=4, agents=4, bias_side=3)),
        heads(2, 35 if grid is None else grid.length, 32),
    )
    dims = (1, 35) if grid is None else grid.dims
    q, k, v = (split(part, 4) for part in (model.to_q(x), *model.to_kv(x).chunk(2, -1)))
    boxes = (1, 4) if grid is None else (2, 2)
    agents = torch.stack([q[:, :, box].mean(2) for box in pooling(dims, boxes)], 2)
    gather, spread = (
        F.interpolate(bias, dims, mode="bilinear").flatten(2) for bias in (model.gather_bias, model.spread_bias)
    )
    out = plain(q, agents, plain(agents, k, v, bias=gather), bias=spread.transpose(1, 2))
    image = join(v).transpose(1, 2).unflatten(2, dims)
    detail = F.conv2d(image, model.detail.weight, model.detail.bias, padding=1, groups=32)
    expected = model.to_out(join(out) + detail.flatten(2).transpose(1, 2))
    agree(model(x, layout=grid), expected, x, *model.parameters())


def pooling(dims: tuple[int, ...], boxes: tuple[int, ...]) -> list[Tensor]:
    """Tokens of each box of adaptive pooling: from floor(i n / s) to ceil((i + 1) n / s) along each axis."""
    places = torch.arange(math.prod(dims)).view(dims)
    edges = [[slice(i * n // s, -(-(i + 1) * n // s)) for i in range(s)] for n, s in zip(dims, boxes, strict=True)]
    return [places[box].flatten() for box in itertools.product(*edges)]


def test_agents_inside_a_pretrained_model_are_the_authors_formula() -> None:
    q, k, v = heads(1, 4, 24, 8), heads(1, 2, 24, 8), heads(1, 2, 24, 8)
    got = AgentCore(agents=6, flatness=0.3, shortcut=0.075)(q, k, v)
    keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    agents = q.unflatten(2, (6, 4)).mean(3)
    scale = 8**-0.5
    gathered = torch.softmax(scale * agents @ keys.transpose(2, 3), -1) @ values
    out = torch.softmax(scale**0.3 * q @ agents.transpose(2, 3), -1) @ gathered
    agree(got, out + 0.075 * values, q, k, v)


def test_agents_refuse_what_they_cannot_honour() -> None:
    q = torch.randn(1, 2, 9, 8)
    padding = key_padding(torch.ones(1, 9, dtype=torch.bool))
    for wrong in ({"within": causal}, {"within": padding}, {"softcap": 3.0}, {"weights": "sigmoid"}):
        with pytest.raises(ValueError, match="agent"):
            AgentCore(4)(q, q, q, **wrong)
    with pytest.raises(ValueError, match="square"):
        AgentAttention(32, agents=5)
    with pytest.raises(ValueError, match="images and sequences"):
        AgentAttention(32)(torch.randn(1, 8, 32), layout=Grid(2, 2, 2))
