"""Tree attention: the gradient of the paper's energy, whatever the split, for as many bytes as the paper says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from foveate.parallel import tree
from foveate.parallel.tree import tree_attention
from foveate.testing import check_parallel


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.paper("Tree Attention", "works_when")
def test_any_split_over_ranks_equals_one_device(seed: int) -> None:
    report = check_parallel("tree_attention", seed=seed)
    assert {check.status for check in report.checks} == {"passed"}


def energy(source: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The paper's: F = Σ log Σ_a exp(q·k_a + ζ·v_a), whose gradient in ζ at 0 is attention."""
    logits = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(q.shape[3])
    return (logits + torch.einsum("bhnd,bhmd->bhnm", source, v)).logsumexp(-1).sum()


@pytest.mark.paper("Tree Attention", "definition")
@pytest.mark.paper("Tree Attention", "works_when")
@pytest.mark.usefixtures("alone")
def test_it_is_the_gradient_of_the_energy() -> None:
    q, k, v = (torch.randn(2, 3, n, 5, dtype=torch.float64, requires_grad=True) for n in (4, 13, 13))
    source = torch.zeros(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(energy(source, q, k, v), source, create_graph=True)
    out = tree_attention(q, k, v)
    assert_close(out, expected)
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), cotangent)
    for one, other in zip(found, torch.autograd.grad(expected, (q, k, v), cotangent), strict=True):
        assert_close(one, other)


class Ranks:
    """Counts the numbers that are reduced."""

    def __init__(self) -> None:
        self.sent = 0

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        self.sent += tensor.numel()


@pytest.mark.paper("Tree Attention", "definition")
def test_what_is_sent_does_not_grow_with_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's count: b d numerators, and b n_h of both denominators and maxima, a reduction of each."""
    batch, heads, width = 2, 4, 6
    for keys in (7, 700):
        ranks = Ranks()
        monkeypatch.setattr(tree.dist, "all_reduce", ranks.all_reduce)
        q, k, v = (torch.randn(batch, heads, n, width) for n in (1, keys, keys))
        tree_attention(q, k, v)
        assert ranks.sent == batch * heads * width + 2 * batch * heads


@pytest.mark.usefixtures("alone")
def test_large_logits_and_low_precision() -> None:
    q, k, v = (torch.randn(1, 2, n, 8) for n in (1, 9, 9))
    expected = ((1e4 * q @ k.mT / math.sqrt(8)).softmax(-1)) @ v
    assert_close(tree_attention(1e4 * q, k, v), expected)
    assert tree_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).dtype == torch.bfloat16
