"""Mixers and operators become one graph each, with sizes fixed or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate import attend, causal, causal_conv, recur, scan, sinks, topk_blocks, window
from foveate.catalogue.registry import row
from foveate.testing.case import Subject


@pytest.mark.parametrize("name", ["streaming_llm", "nsa", "moba"])
def test_mixers_that_choose_become_one_graph(name: str) -> None:
    found = row(name)
    mixer = Subject(found, getattr(found.mixer, "tiny", {}), causal=True).mixer(torch.float32)
    x = torch.randn(2, 50, 32, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mixer(x))
    got, want = (torch.autograd.grad(run(x).square().sum(), x)[0] for run in (compiled, mixer))
    torch.testing.assert_close(got, want)


class Attended(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return attend(q, k, v, window(5) & causal | sinks(2)), attend(q, k, v, topk_blocks(4, k=2)), attend(q, k, v)


class Recurred(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return tuple(recur(q, k, v, decay=-torch.sigmoid(q[..., 0])))


class Scanned(nn.Module):
    def forward(self, x: Tensor, dt: Tensor, B: Tensor, w: Tensor, A: Tensor) -> tuple[Tensor, ...]:
        return *scan(x, dt, A, B, B, softplus=True), causal_conv(x, w).out


def heads(length: int) -> list[Tensor]:
    return list(torch.randn(3, 1, 2, length, 8).unbind())


def channels(length: int) -> list[Tensor]:
    x, dt, B = torch.randn(1, length, 4), torch.randn(1, length, 4), torch.randn(1, length, 3)
    return [x, dt, B, torch.randn(4, 3), -torch.rand(4, 3)]


LENGTHS = [
    (Attended, heads, {2: 3}),
    (Recurred, heads, {2: 3}),
    (Scanned, channels, {1: 3}),
]


@pytest.mark.parametrize(("module", "inputs", "axes"), LENGTHS)
def test_exported_programs_take_other_lengths(
    module: type[nn.Module], inputs: Callable[[int], list[Tensor]], axes: dict[int, int]
) -> None:
    length = torch.export.Dim("length", min=3, max=4096)
    ((axis, count),) = axes.items()
    first, other = inputs(20), inputs(33)
    shapes: list[Any] = [{axis: length} if place < count else None for place in range(len(first))]
    fixed, free = (
        torch.export.export(module(), tuple(first), dynamic_shapes=s).module() for s in (None, tuple(shapes))
    )
    torch.testing.assert_close(fixed(*first), module()(*first))
    for given in (first, other):
        torch.testing.assert_close(free(*given), module()(*given))


@pytest.mark.parametrize(("module", "inputs", "axes"), LENGTHS)
def test_one_graph_for_many_lengths(
    module: type[nn.Module], inputs: Callable[[int], list[Tensor]], axes: dict[int, int]
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(module(), fullgraph=True, backend="aot_eager", dynamic=True)
    for given in (inputs(20), inputs(33)):
        torch.testing.assert_close(compiled(*given), module()(*given))
