"""Star Attention: blocks behind an anchor, an exact query over all of them, and what is sent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.support.masked import masked
from torch import Tensor
from torch.testing import assert_close

from foveate.parallel import star, star_context, star_query
from foveate.testing import check_parallel

BLOCK, HOSTS, QUERY = 5, 4, 3
N = BLOCK * HOSTS


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def heads(length: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, 4, length, 6), (2, 2, length, 6), (2, 2, length, 5))
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return q, k, v


def same(found: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
    towards = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(y, inputs, towards) for y in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.paper("Star Attention", "works_when")
@pytest.mark.parametrize("name", ["star_context", "star_query"])
def test_any_number_of_hosts_equals_one_device(name: str, seed: int) -> None:
    report = check_parallel(name, seed=seed)
    assert not report.failed and sum(check.status == "passed" for check in report.checks) >= 5


@pytest.mark.paper("Star Attention", "definition")
@pytest.mark.paper("Star Attention", "works_when")
def test_blocks_see_themselves_and_the_anchor() -> None:
    """Token by token: causal inside its block, all of the first block besides."""
    q, k, v = heads(N)
    seen = torch.tensor([[j <= i and (j // BLOCK == i // BLOCK or j < BLOCK) for j in range(N)] for i in range(N)])
    anchor = k[:, :, :BLOCK], v[:, :, :BLOCK]
    same(star_context(q, k, v, *anchor, block=BLOCK), masked(q, k, v, seen), q, k, v)


@pytest.mark.paper("Star Attention", "definition")
@pytest.mark.paper("Star Attention", "works_when")
@pytest.mark.usefixtures("alone")
def test_the_query_sees_all_that_is_kept() -> None:
    q, k, v = heads(N + QUERY)
    seen = torch.tensor([[j <= N + i for j in range(N + QUERY)] for i in range(QUERY)])
    context, own = (k[:, :, :N], v[:, :, :N]), (k[:, :, N:], v[:, :, N:])
    same(star_query(q[:, :, N:], *context, *own), masked(q[:, :, N:], k, v, seen), q, k, v)


@pytest.mark.paper("Star Attention", "works_when")
@pytest.mark.usefixtures("alone")
def test_of_one_block_it_is_dense() -> None:
    q, k, v = heads(N + QUERY)
    context, own = (k[:, :, :N], v[:, :, :N]), (k[:, :, N:], v[:, :, N:])
    first = star_context(q[:, :, :N], *context, *context, block=N)
    second = star_query(q[:, :, N:], *context, *own)
    causal = torch.ones(N + QUERY, N + QUERY, dtype=torch.bool).tril()
    same(torch.cat([first, second], 2), masked(q, k, v, causal), q, k, v)


def transformer(x: Tensor, weights: list[Tensor], attend: Any) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Layers x + attention(x): the tokens that come out, and the keys and values of each layer."""
    kept = []
    for number, (q, k, v) in enumerate(weights):
        split = [(x @ one).unflatten(-1, (2, -1)).transpose(1, 2) for one in (q, k, v)]
        kept.append((split[1], split[2]))
        x = x + attend(number, *split).transpose(1, 2).flatten(2)
    return x, kept


@pytest.mark.paper("Star Attention", "works_when")
@torch.no_grad()
def test_simulated_hosts_read_a_context_through_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each host reads anchor and block, and a query goes through the layers: as one device under the mask, two deep."""
    weights = [tuple(torch.randn(8, 8, dtype=torch.float64) / 3 for _ in range(3)) for _ in range(2)]
    tokens = torch.randn(1, N + QUERY, 8, dtype=torch.float64)
    length = N + QUERY
    seen = torch.tensor(
        [[j <= i and (i >= N or j // BLOCK == i // BLOCK or j < BLOCK) for j in range(length)] for i in range(length)]
    )
    expected, _ = transformer(tokens, weights, lambda number, q, k, v: masked(q, k, v, seen))
    monkeypatch.setattr(star.dist, "is_initialized", lambda: True)
    shards = []
    for host in range(HOSTS):
        monkeypatch.setattr(star.dist, "get_rank", lambda group: host)  # noqa: B023
        anchor = tokens[:, :BLOCK]
        read = tokens[:, host * BLOCK : (host + 1) * BLOCK]

        def local(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if host == 0:  # noqa: B023
                return star_context(q, k, v, k, v, block=BLOCK)
            first = k[:, :, :BLOCK], v[:, :, :BLOCK]
            of_anchor = masked(q[:, :, :BLOCK], *first, torch.ones(BLOCK, BLOCK).tril().bool())
            own = (one[:, :, BLOCK:] for one in (q, k, v))
            return torch.cat([of_anchor, star_context(*own, *first, block=BLOCK)], 2)

        _, kept = transformer(read if host == 0 else torch.cat([anchor, read], 1), weights, local)
        shards.append([(k[:, :, -BLOCK:], v[:, :, -BLOCK:]) for k, v in kept])

    def exact(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cached = [torch.cat([shard[number][which] for shard in shards], 2) for which in (0, 1)]
        return masked(q, torch.cat([cached[0], k], 2), torch.cat([cached[1], v], 2), seen[N:])

    found, _ = transformer(tokens[:, N:], weights, exact)
    assert_close(found, expected[:, N:], rtol=1e-9, atol=1e-9)


@pytest.mark.paper("Star Attention", "definition")
@pytest.mark.usefixtures("alone")
def test_a_rank_sends_outputs_and_log_sums_of_the_query_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    gather = dist.all_gather

    def counted(found: list[Tensor], x: Tensor, group: Any = None) -> None:
        sent.append(x.numel())
        gather(found, x, group=group)

    monkeypatch.setattr(star.dist, "all_gather", counted)
    for length in (7, 700):
        (_, k, v), (q, own_k, own_v) = heads(length), heads(QUERY)
        star_query(q, k, v, own_k, own_v)
        star_context(*heads(length), k[:, :, :7], v[:, :, :7], block=7)
    assert sent == [2 * 4 * QUERY * (5 + 1)] * 2


def test_parts_of_blocks_are_refused() -> None:
    q, k, v = heads(9)
    with pytest.raises(ValueError, match="whole blocks of 5 tokens; got 9 tokens"):
        star_context(q, k, v, k, v, block=5)
