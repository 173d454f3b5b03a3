"""Attention on graphs: Polynormer against dense matrices, and under every order of nodes and edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.formulas import follows
from torch import Tensor
from torch.nn.functional import leaky_relu
from torch.testing import assert_close

from foveate import Grid
from foveate.layouts.graph import Graph, edge_attention, edges_of
from foveate.mixers.base import join_heads, split_heads
from foveate.mixers.costs import count_forward
from foveate.mixers.linear.polynormer import EdgeAttention, Polynormer

DIM, HEADS, NODES = 24, 3, 19


def make(**options: Any) -> Polynormer:
    mixer = Polynormer(DIM, heads=HEADS, **options).double()
    for parameter in mixer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return mixer


def some_edges(number: int = 40) -> Tensor:
    """Distinct edges, loops among them; the last node has none."""
    chosen = torch.randperm((NODES - 1) ** 2)[:number]
    return torch.stack([chosen // (NODES - 1), chosen % (NODES - 1)])


def tokens() -> Tensor:
    return torch.randn(2, NODES, DIM, dtype=torch.float64)


def dense(scores: Tensor, edges: Tensor) -> Tensor:
    """Scores (B, H, E) as a matrix of weights (B, H, N, N); rows of nodes without edges are zeros."""
    matrix = torch.full((*scores.shape[:2], NODES, NODES), -torch.inf, dtype=scores.dtype)
    matrix[:, :, edges[1], edges[0]] = scores
    return matrix.softmax(-1).nan_to_num(0)


def test_edge_attention_is_a_softmax_over_each_nodes_edges() -> None:
    edges, values = some_edges(), torch.randn(2, HEADS, NODES, 5).double()
    scores = 1000 * torch.randn(2, HEADS, edges.shape[1]).double()
    out = edge_attention(scores, values, edges)
    assert_close(out, dense(scores, edges) @ values)
    assert (out[:, :, -1] == 0).all()


def test_gradients_of_edge_attention() -> None:
    edges = torch.tensor([[0, 1, 2, 2, 3], [1, 1, 1, 0, 3]])
    scores, values = torch.randn(1, 2, 5).double(), torch.randn(1, 2, 5, 3).double()
    inputs = [x.requires_grad_() for x in (scores, values)]
    assert torch.autograd.gradcheck(lambda *pair: edge_attention(*pair, edges), inputs)


@pytest.mark.paper("Polynormer", "definition")
@pytest.mark.parametrize("shared", [True, False])
def test_polynormer_is_its_formula(shared: bool) -> None:
    mixer = Polynormer(DIM, HEADS, shared=shared, local_layers=2, global_layers=2).double()
    x, edges = tokens().requires_grad_(), some_edges()

    def formula() -> Tensor:
        out, total = x, torch.zeros_like(x)
        for layer in mixer.local_layers:
            v = split_heads(layer.attention.to_v(out), HEADS)
            source = torch.einsum("bhnd,hod->bhn", v, layer.attention.as_source)
            target = torch.einsum("bhnd,hod->bhn", v, layer.attention.as_target)
            scores = leaky_relu(source[:, :, edges[0]] + target[:, :, edges[1]], 0.2)
            mixed = (join_heads(dense(scores, edges) @ v) + layer.to_self(out)).relu()
            beta = layer.beta.sigmoid()
            out = (1 - beta) * layer.norm(layer.to_factor(out).relu() * mixed) + beta * mixed
            total = total + out
        out = mixer.norm(total)
        for layer in mixer.global_layers:
            k = split_heads(layer.to_k(out), HEADS).sigmoid()
            q = k if shared else split_heads(layer.to_q(out), HEADS).sigmoid()
            weights = q @ k.transpose(2, 3)
            mixed = join_heads(weights / weights.sum(-1, keepdim=True) @ split_heads(layer.to_v(out), HEADS))
            out = mixer.to_out(layer.norm(mixed) * (layer.to_factor(out) + layer.beta.sigmoid())).relu()
        return out

    follows(mixer, lambda: mixer(x, layout=Graph(edges, NODES)), formula, x)


def test_beta_starts_as_the_authors_start_it() -> None:
    mixer = Polynormer(512, local_layers=7, global_layers=2)
    for layers, number in ((mixer.local_layers, 7), (mixer.global_layers, 2)):
        found = torch.stack([layer.beta for layer in layers]).std()
        assert 0.85 < found / (2 / (number + 512)) ** 0.5 < 1.15


def test_edge_attention_starts_from_glorots_distribution() -> None:
    layer = EdgeAttention(960, heads=40)
    for part, fans in ((layer.to_v.weight, 960 + 960), (layer.as_source, 40 + 24), (layer.as_target, 40 + 24)):
        bound = (6 / fans) ** 0.5
        assert 0.95 * bound < part.abs().max() <= bound
        assert 0.9 < part.std() / (bound / 3**0.5) < 1.1


@pytest.mark.paper("Polynormer", "works_when")
def test_order_of_nodes_and_edges_does_not_matter() -> None:
    mixer, x, edges = make(), tokens(), some_edges()
    order = torch.randperm(NODES)
    place = order.argsort()  # node i of before is at place[i]
    shuffled = place[edges[:, torch.randperm(edges.shape[1])]]
    out = mixer(x, layout=Graph(edges, NODES))
    assert_close(mixer(x[:, order], layout=Graph(shuffled, NODES)), out[:, order])


def test_local_layers_see_neighbours_only_and_global_ones_all() -> None:
    edges = torch.tensor([[0, 1, 5], [1, 2, 6]])
    x = tokens()
    changed = x.clone()
    changed[:, 0] += 1
    for layers, seen in ((0, {0, 1}), (1, set(range(NODES)))):
        mixer = make(global_layers=layers)
        moved = (mixer(changed, layout=Graph(edges, NODES)) - mixer(x, layout=Graph(edges, NODES))).abs().amax((0, 2))
        assert set(torch.nonzero(moved > 1e-12).flatten().tolist()) == seen


def test_a_grid_is_the_graph_of_its_neighbours() -> None:
    edges = edges_of(Grid(3, 4), torch.device("cpu"))
    pairs = {tuple(pair) for pair in edges.T.tolist()}
    near = {(a, b) for a in range(12) for b in range(12) if abs(a // 4 - b // 4) + abs(a % 4 - b % 4) == 1}
    assert pairs == near and edges.shape[1] == len(near)


@pytest.mark.paper("Polynormer", "works_when")
def test_it_runs_on_many_nodes_and_edges() -> None:
    """A matrix of 60,000 x 60,000 would not fit."""
    mixer = Polynormer(8, heads=2)
    graph = Graph(torch.randint(60_000, (2, 200_000)), 60_000)
    x = torch.randn(1, 60_000, 8, requires_grad=True)
    mixer(x, layout=graph).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_cost_is_linear_in_nodes_and_edges() -> None:
    mixer = Polynormer(64)

    def counted(nodes: int, edges: int) -> int:
        found = count_forward(mixer, nodes, Graph(torch.randint(nodes, (2, edges)), nodes))
        return found.flops + found.elements

    assert counted(2000, 10_000) == pytest.approx(2 * counted(1000, 5000), rel=0.01)
    assert counted(1000, 15_000) - counted(1000, 10_000) == counted(1000, 10_000) - counted(1000, 5000) > 0


def test_what_is_no_graph_is_refused() -> None:
    mixer, x = make(), tokens()
    with pytest.raises(ValueError, match="nodes of a graph"):
        mixer(x)
    with pytest.raises(ValueError, match="20 tokens"):
        mixer(x, layout=Graph(some_edges(), NODES + 1))
    with pytest.raises(ValueError, match="whole numbers"):
        Graph(torch.zeros(3, 5, dtype=torch.long), 5)
    with pytest.raises(ValueError, match="nodes 0 to 4"):
        Graph(torch.tensor([[0], [5]]), 5)
    with pytest.raises(ValueError, match="local"):
        Polynormer(DIM, heads=HEADS, local_layers=0)
