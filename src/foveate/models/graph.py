"""Models of graphs."""

from __future__ import annotations

from torch import Tensor, nn

from foveate.catalogue.tiers import model
from foveate.mixers.linear.polynormer import Polynormer
from foveate.patterns import Grid, Layout


class NodeClassifier(nn.Module):
    """Polynormer between a linear layer that reads nodes (B, N, channels) and one that tells their classes.

    ``warm_up`` leaves out the global layers: the authors train a model so first, with a head of its own. Where no
    layout is given, nodes are joined to those beside them.
    """

    def __init__(self, polynormer: Polynormer, channels: int, classes: int, *, in_dropout: float) -> None:
        super().__init__()
        dim, self.warm_up = polynormer.dim, False
        self.enter, self.polynormer = nn.Linear(channels, dim), polynormer
        self.local_head, self.head = nn.Linear(dim, classes), nn.Linear(dim, classes)
        self.in_dropout, self.dropout = nn.Dropout(in_dropout), polynormer.dropout

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """Logits (B, N, classes)."""
        layout = Grid(1, x.shape[1]) if layout is None else layout
        x = self.dropout(self.enter(self.in_dropout(x)))
        if self.warm_up:
            return self.local_head(self.polynormer.over_edges(x, layout))
        return self.head(self.polynormer(x, layout=layout))


@model(
    "polynormer_classifier",
    papers=("Polynormer",),
    inputs="vectors",
    presets={},
    tiny={"channels": 8, "classes": 3, "dim": 8, "heads": 2, "local_layers": 2, "global_layers": 1},
    exempt={"gradients": "the head of the local warm-up learns in the warm-up alone"},
)
def polynormer_classifier(
    channels: int = 300,
    classes: int = 18,
    *,
    dim: int = 256,
    heads: int = 1,
    local_layers: int = 7,
    global_layers: int = 2,
    in_dropout: float = 0.15,
    dropout: float = 0.5,
) -> NodeClassifier:
    """Polynormer, a graph transformer of polynomials in linear time, with classes of its nodes: the authors' sizes.

    Deng, Yue, Zhang, Polynormer: Polynomial-Expressive Graph Transformer in Linear Time, arXiv 2403.01232. Channels
    and classes are those of its roman-empire graph.

    >>> import torch
    >>> from foveate.layouts.graph import Graph
    >>> model = polynormer_classifier(8, 3, dim=16, local_layers=2, global_layers=1)
    >>> model(torch.randn(1, 50, 8), Graph(torch.randint(50, (2, 200)), 50)).shape
    torch.Size([1, 50, 3])
    """
    inner = Polynormer(dim, heads, local_layers=local_layers, global_layers=global_layers, dropout=dropout)
    return NodeClassifier(inner, channels, classes, in_dropout=in_dropout)
