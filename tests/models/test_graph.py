"""polynormer_classifier: its parts, and what its products with the whole graph learn that GAT does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from foveate.layouts.graph import Graph
from foveate.mixers.linear.polynormer import EdgeAttention
from foveate.models.graph import polynormer_classifier

CHANNELS, CLASSES, NODES = 8, 2, 120


class GAT(nn.Module):
    """The same attention along edges, each layer a sum with the node itself and a ReLU: no products."""

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(CHANNELS, dim), nn.Linear(dim, CLASSES)
        self.attentions = nn.ModuleList(EdgeAttention(dim, 2) for _ in range(layers))
        self.selves = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        x = self.enter(x)
        for attention, own, norm in zip(self.attentions, self.selves, self.norms, strict=True):
            x = norm((attention(x, graph.edges) + own(x)).relu())
        return self.head(x)


def nodes_and_classes() -> tuple[Tensor, Graph, Tensor]:
    """Whether a node lies on the side to which its whole graph leans: a product with what no neighbour knows."""
    lean, sources = 0.7 * torch.randn(2), torch.randint(NODES, (NODES,))
    x = torch.randn(1, NODES, CHANNELS)
    side = x[0, :, :2] @ lean > 0
    x[..., :2] += lean
    return x, Graph(torch.stack([sources, torch.arange(NODES)]), NODES), side.long()


def learned(model: nn.Module, call: Callable[[Tensor, Graph], Tensor], steps: int) -> float:
    """The share of nodes of new graphs that it classifies rightly."""
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(steps):
        x, graph, classes = nodes_and_classes()
        optimizer.zero_grad()
        cross_entropy(call(x, graph)[0], classes).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        torch.manual_seed(1)  # every model is tried on the same
        trials = [nodes_and_classes() for _ in range(40)]
        return sum((call(x, graph)[0].argmax(-1) == y).float().mean().item() for x, graph, y in trials) / 40


@pytest.mark.paper("Polynormer", "works_when")
def test_products_with_the_whole_graph_are_learned_better_than_by_gat() -> None:
    torch.manual_seed(0)
    model = polynormer_classifier(
        CHANNELS, CLASSES, dim=24, heads=2, local_layers=2, global_layers=1, in_dropout=0.0, dropout=0.0
    )
    found, plain = learned(model, model, 200), GAT(24, 3)
    other = learned(plain, plain, 200)
    assert found > 0.77 and found > other + 0.03, f"polynormer tells {found:.0%}, GAT {other:.0%}"


@pytest.mark.paper("Polynormer", "definition")
def test_the_model_reads_nodes_warms_up_locally_and_tells_classes() -> None:
    model = polynormer_classifier(CHANNELS, CLASSES, dim=24, heads=2, local_layers=2, global_layers=1).double().eval()
    x, graph, _ = nodes_and_classes()
    nodes = model.enter(x.double())
    assert_close(model(x.double(), graph), model.head(model.polynormer(nodes, layout=graph)))
    layers, out, total = model.polynormer.local_layers, nodes, torch.zeros_like(nodes)
    for layer in layers:
        out = layer(out, graph.edges)
        total = total + out
    model.warm_up = True
    assert_close(model(x.double(), graph), model.local_head(total))
    whole = polynormer_classifier()
    assert (len(whole.polynormer.local_layers), len(whole.polynormer.global_layers)) == (7, 2)
    assert (whole.in_dropout.p, whole.dropout.p, whole.enter.weight.shape) == (0.15, 0.5, (256, 300))
