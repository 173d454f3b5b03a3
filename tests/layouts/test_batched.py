"""Clouds, graphs and orders that differ by batch entry, or lie end to end: each as if it were alone."""

from typing import Any

import pytest
import torch
from tests.support.formulas import shaken
from torch import Tensor

from foveate import (
    Graph,
    Order,
    Points,
    alibi,
    attend,
    causal,
    full,
    key_padding,
    scan_orders,
    sinks,
    topk_blocks,
    within,
)
from foveate.catalogue.registry import mixer
from foveate.counting import count_operations
from foveate.layouts import by_score, morton
from foveate.patterns import Pattern

IMPLEMENTATIONS = ("native", "tiles", "sdpa", "reference")


def qkv(batch: int, n: int) -> list[Tensor]:
    return [torch.randn(batch, heads, n, 8, requires_grad=True) for heads in (4, 2, 2)]


def lattice(*shape: int) -> Tensor:
    """Coordinates in sixteenths, whose distances no rounding takes across the radii here."""
    return torch.randint(17, shape) / 16


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """softmax(q k^T / √d) v over seen pairs (B, N, M), in float64; zeros where none is seen."""
    q, k, v = (x.double().repeat_interleave(4 // x.shape[1], dim=1) for x in (q, k, v))
    logits = (q @ k.mT / 8**0.5).masked_fill(~seen.unsqueeze(1), float("-inf"))
    return logits.softmax(-1).nan_to_num(0) @ v


def near(coords: Tensor, radius: float) -> Tensor:
    """Pairs (..., N, N) at most so far apart."""
    return (coords.unsqueeze(-2) - coords.unsqueeze(-3)).double().norm(dim=-1) <= radius


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_clouds_of_a_batch_are_each_their_own(impl: str) -> None:
    coords = lattice(3, 150, 3)
    inputs = qkv(3, 150)
    out = attend(*inputs, within(0.3), layout=Points(coords), impl=impl)
    wanted = plain(*inputs, near(coords, 0.3))
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-4)
    given = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, given)
    for one, other in zip(found, torch.autograd.grad(wanted, inputs, given.double()), strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_clouds_end_to_end_do_not_see_one_another(impl: str) -> None:
    lengths, coords, inputs = [70, 0, 1, 95], lattice(166, 2), qkv(1, 166)
    out = attend(*inputs, within(0.4), layout=Points(coords, lengths=lengths), impl=impl)
    cloud = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    seen = near(coords, 0.4) & (cloud.unsqueeze(0) == cloud.unsqueeze(1))
    torch.testing.assert_close(out.double(), plain(*inputs, seen.unsqueeze(0)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "pattern", [within(0.4) & causal, within(0.3) | sinks(2), ~within(0.5), within(0.5) & topk_blocks(16, 2)]
)
def test_compounds_in_clouds_are_those_of_each_alone(impl: str, pattern: Pattern) -> None:
    coords, inputs = lattice(2, 90, 2), qkv(2, 90)
    out = attend(*inputs, pattern, layout=Points(coords), impl=impl)
    for entry in range(2):
        own = [x[entry : entry + 1] for x in inputs]
        alone = attend(*own, pattern, layout=Points(coords[entry]), impl="reference")
        torch.testing.assert_close(out[entry : entry + 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_padded_clouds_are_those_without_padding(impl: str) -> None:
    coords, inputs, lengths = lattice(2, 90, 3), qkv(2, 90), torch.tensor([[90], [33]])
    real = torch.arange(90).expand(2, -1) < lengths
    bias = alibi(torch.rand(4))
    out = attend(
        *inputs,
        within(0.5) & key_padding(real),
        layout=Points(coords),
        bias=bias,
        impl=impl if impl != "sdpa" else "auto",
    )
    for entry, length in enumerate((90, 33)):
        own = [x[entry : entry + 1, :, :length] for x in inputs]
        alone = attend(*own, within(0.5), layout=Points(coords[entry, :length]), bias=bias, impl="reference")
        torch.testing.assert_close(out[entry : entry + 1, :, :length], alone, atol=1e-5, rtol=1e-4)


def test_pairs_of_clouds_are_counted_each_in_its_own() -> None:
    coords = lattice(3, 200, 2)
    with count_operations() as counted:
        attend(*qkv(3, 200), within(0.2), layout=Points(coords))
    assert counted.pairs == 4 * int(near(coords, 0.2).sum())
    assert counted.computed < 0.9 * 3 * 4 * 256**2, "tiles follow each cloud's own curve"


@pytest.mark.parametrize("backward", ["reversed", "channels"])
def test_mamba3d_reads_every_cloud_as_if_it_were_alone(backward: str) -> None:
    model = shaken(mixer("mamba3d", 16, neighbours=3, expand=1, state=4, backward=backward))
    x, coords = torch.randn(3, 17, 16, dtype=torch.float64), torch.rand(3, 17, 3)
    alone = torch.cat([model(x[b : b + 1], layout=Points(coords[b])) for b in range(3)])
    torch.testing.assert_close(model(x, layout=Points(coords)), alone)
    lengths = [5, 0, 12]
    parts = [
        model(own, layout=Points(at))
        for own, at in zip(x[:1].split(lengths, 1), coords[0].split(lengths), strict=True)
        if len(at)
    ]
    torch.testing.assert_close(model(x[:1], layout=Points(coords[0], lengths=lengths)), torch.cat(parts, 1))


def test_polynormer_reads_every_graph_as_if_it_were_alone() -> None:
    model = shaken(mixer("polynormer", 16, heads=4, local_layers=2))
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    edges = [torch.randint(9, (2, 20)), torch.randint(9, (2, 7))]
    alone = torch.cat([model(x[b : b + 1], layout=Graph(edges[b], 9)) for b in range(2)])
    torch.testing.assert_close(model(x, layout=Graph(edges, 9)), alone)
    left, right = torch.randint(4, (2, 6)), torch.randint(5, (2, 8))
    packed = Graph(torch.cat([left, right + 4], dim=1), 9, lengths=[4, 5])
    parts = [model(x[:1, :4], layout=Graph(left, 4)), model(x[:1, 4:], layout=Graph(right, 5))]
    torch.testing.assert_close(model(x[:1], layout=packed), torch.cat(parts, 1))


# ---- orders ------------------------------------------------------------------------------------------------


def test_an_order_of_each_entry_moves_tokens_and_their_gradients() -> None:
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(2, 7)
    order = by_score(scores)
    moved = order.apply(x)
    for entry in range(2):
        ranked = sorted(range(7), key=lambda token: float(scores[entry, token]))
        assert torch.equal(moved[entry], x[entry, ranked])
    assert torch.equal(order.undo(moved), x) and len(order) == 7
    heads = x.unsqueeze(1).expand(-1, 2, -1, -1)
    assert torch.equal(order.undo(order.apply(heads, 2), -2), heads)
    (moved * torch.arange(7.0).view(1, 7, 1)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[:, :, 0], scores.argsort(1).argsort(1).double())


def test_mixers_read_along_an_order_of_each_entry() -> None:
    model = shaken(mixer("mamba", 8, expand=1, state=4))
    x, order = torch.randn(3, 11, 8, dtype=torch.float64), Order(torch.stack([torch.randperm(11) for _ in range(3)]))
    found = scan_orders(model, x, [order])
    for entry in range(3):
        index = order.index[entry]
        wanted = torch.empty(11, 8, dtype=torch.float64)
        wanted[index] = model(x[entry : entry + 1, index])[0]
        torch.testing.assert_close(found[entry], wanted)


def test_morton_walks_every_cloud_in_turn() -> None:
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])  # the curve takes the first axis first
    shuffled = torch.stack([torch.randperm(4), torch.randperm(4)])
    order = morton(Points(corners[shuffled]))
    assert torch.equal(order.apply(corners[shuffled]), corners[[0, 2, 1, 3]].expand(2, -1, -1))
    packed = morton(Points(corners[[3, 0, 2, 1, 0]], lengths=[2, 0, 3])).index.tolist()
    assert packed == [1, 0, 4, 2, 3]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Points(torch.rand(2, 3, 4, 5)), "float coordinates"),
        (lambda: Points(torch.rand(5, 2), lengths=[2, 2]), "add up"),
        (lambda: Points(torch.rand(1, 5, 2), lengths=[5]), "add up"),
        (lambda: Points(torch.full((2, 3, 2), float("nan"))), "3 points have|6 of 6 points have"),
        (lambda: attend(*qkv(2, 5), within(1.0), layout=Points(torch.rand(3, 5, 2))), "batch of 3"),
        (lambda: mixer("mamba3d", 8)(torch.randn(2, 5, 8), layout=Points(torch.rand(3, 5, 2))), "batch of 3"),
        (lambda: Graph([torch.tensor([[0], [7]])], 5), "nodes 0 to 4"),
        (lambda: Graph(torch.tensor([[0, 1], [1, 2]]), 5, lengths=[2, 3]), "from node 1 to 2"),
        (lambda: Graph(torch.tensor([[0], [1]]), 5, lengths=[2, 2]), "add up"),
        (lambda: Order(torch.tensor([[0, 1], [1, 1]])), "each token once"),
        (lambda: Order(torch.tensor([[0, 1], [1, 0]])).apply(torch.zeros(3, 2, 1)), "does not fit"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_a_cloud_for_all_entries_is_as_before() -> None:
    coords, inputs = torch.rand(1, 50, 2), qkv(3, 50)
    shared = attend(*inputs, within(0.4), layout=Points(coords))
    torch.testing.assert_close(shared, attend(*inputs, within(0.4), layout=Points(coords[0])))
    torch.testing.assert_close(attend(*inputs, full, layout=Points(coords)), attend(*inputs))
