"""Gradients of gradients, where a formula that is right may have none: rows that see nothing, numbers far apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from foveate import attend, boolean_mask, causal, log_decay, softmax


def second_gradients(call: Callable[..., Tensor], leaves: Sequence[Tensor], along: Sequence[Tensor]) -> list[Tensor]:
    """Of the first gradients, each times a tensor, summed up."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    first = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
    total = torch.stack([(x * way).sum() for x, way in zip(first, along, strict=True)]).sum()
    return list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("sink", [0.3, 900.0, -900.0])
def test_a_sink_beside_rows_that_see_nothing(sink: float) -> None:
    leaves = [torch.randn(2, 3, 7, 5, dtype=torch.float64) for _ in range(3)]
    leaves.append(sink + torch.randn(3, dtype=torch.float64))
    along = [torch.randn_like(x) for x in leaves]
    seen = torch.rand(7, 7) < 0.6
    seen[2], seen[5] = False, False

    def dense(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        logits = (q @ k.mT * 5**-0.5).masked_fill(~seen, -torch.inf)
        logits = torch.cat([logits, sink.view(1, 3, 1, 1).expand(2, 3, 7, 1)], -1)
        return logits.softmax(-1)[..., :-1] @ v

    def ours(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        return attend(q, k, v, boolean_mask(seen), weights=softmax(sink=sink))

    for mine, true in zip(second_gradients(ours, leaves, along), second_gradients(dense, leaves, along), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-11)


def test_float32_gates_beside_float64_tensors_lose_no_digits() -> None:
    leaves = [torch.randn(1, 2, 40, 3, dtype=torch.float64) for _ in range(3)]
    gates = -torch.rand(1, 2, 40)
    along = [torch.randn_like(x) for x in (*leaves, gates)]

    def call(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        return attend(q, k, v, causal, bias=log_decay(gates))

    low, high = (second_gradients(call, [*leaves, x], along) for x in (gates, gates.double()))
    for mine, true in zip(low[:3], high[:3], strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(low[3], high[3].float())
