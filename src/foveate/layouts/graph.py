"""Tokens that are the nodes of a graph, and attention along its edges."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.counts import whole_numbers
from foveate.layouts.kinds import Grid, Layout
from foveate.plain import remembered


@dataclass(frozen=True, eq=False)
class Graph(Layout):
    """Tokens at the nodes of a graph: ``edges`` (2, E) holds the source and the target of each edge.

    This is the edge_index of PyTorch Geometric.

    >>> Graph(torch.tensor([[0, 1, 2], [1, 2, 0]]), 5).length
    5

    A list of edges gives each batch entry a graph of its own, of as many nodes; with ``lengths`` graphs of so many
    nodes lie end to end in N, and no token sees another graph:

    >>> several = Graph([torch.tensor([[0, 1], [1, 2]]), torch.tensor([[4], [0]])], 5)
    >>> several.batches, Graph(torch.tensor([[0, 4], [1, 3]]), 5, lengths=[2, 3]).packed_lengths
    (2, (2, 3))
    """

    edges: Tensor | list[Tensor] | tuple[Tensor, ...]
    num_nodes: int
    lengths: tuple[int, ...] | list[int] | None = None

    def __post_init__(self) -> None:
        for edges in self.each:
            self._check(edges)
        if self.lengths is not None:
            object.__setattr__(self, "lengths", whole_numbers("lengths of graphs", self.lengths))
            self._check_apart(self.lengths)

    def _check(self, edges: Tensor) -> None:
        if edges.dim() != 2 or edges.shape[0] != 2 or edges.is_floating_point() or edges.dtype == torch.bool:
            raise ValueError(
                f"edges are whole numbers (2, E), sources and targets; got {edges.dtype} {tuple(edges.shape)}"
            )
        if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < self.num_nodes:
            raise ValueError(
                f"edges join nodes 0 to {self.num_nodes - 1}; got {int(edges.min())} to {int(edges.max())}"
            )

    def _check_apart(self, lengths: tuple[int, ...] | list[int]) -> None:
        if not isinstance(self.edges, Tensor) or sum(lengths) != self.num_nodes:
            raise ValueError(
                f"lengths of graphs laid end to end add up to the {self.num_nodes} nodes of one edges (2, E); got "
                f"{list(lengths)}"
            )
        ends = torch.tensor(lengths, device=self.edges.device).cumsum(0)
        source, target = torch.bucketize(self.edges.contiguous(), ends, right=True)
        if not torch.equal(source, target):
            first, last = self.edges[:, source != target][:, 0].tolist()
            raise ValueError(f"graphs of {list(lengths)} nodes share no edge; got one from node {first} to {last}")

    @property
    def each(self) -> tuple[Tensor, ...]:
        """The edges of each batch entry, or the only ones."""
        return (self.edges,) if isinstance(self.edges, Tensor) else tuple(self.edges)

    @property
    def length(self) -> int:
        return self.num_nodes

    @property
    def packed_lengths(self) -> tuple[int, ...] | None:
        return None if self.lengths is None else tuple(self.lengths)

    @property
    def batches(self) -> int:
        return len(self.each)

    def __str__(self) -> str:
        return f"Graph({self.num_nodes} nodes, {', '.join(str(edges.shape[1]) for edges in self.each)} edges)"


def edges_of(layout: Layout | None, device: torch.device) -> Tensor:
    """Edges (2, E) of a graph, or those that join the neighbours along each axis of a grid, both ways.

    >>> edges_of(Grid(1, 3), torch.device("cpu")).tolist()
    [[0, 1, 1, 2], [1, 2, 0, 1]]

    Of graphs that differ by batch entry, those of one graph of B N nodes.
    """
    if isinstance(layout, Grid):
        return neighbours(layout.dims).to(device)
    if not isinstance(layout, Graph):
        raise ValueError(
            f"the tokens are nodes of a graph: pass layout=Graph(edges, num_nodes) or a grid; got {layout}"
        )
    return torch.cat([edges.to(device) + entry * layout.num_nodes for entry, edges in enumerate(layout.each)], dim=1)


@remembered(32)
def neighbours(dims: tuple[int, ...]) -> Tensor:
    nodes = torch.arange(Grid(*dims).length).view(dims)
    pairs = [
        torch.stack([nodes.narrow(axis, 0, size - 1).flatten(), nodes.narrow(axis, 1, size - 1).flatten()])
        for axis, size in enumerate(dims)
    ]
    forth = torch.cat(pairs, dim=1)
    return torch.cat([forth, forth.flip(0)], dim=1)


def edge_attention(scores: Tensor, values: Tensor, edges: Tensor) -> Tensor:
    """Σ over the edges into each node of softmax(scores) times the value of the edge's source, in O(N + E).

    scores (B, H, E), values (B, H, N, D), edges (2, E); out (B, H, N, D), zeros at nodes without an edge into them.

    >>> edge_attention(torch.zeros(1, 1, 2), torch.tensor([[[[1.0], [3.0]]]]), torch.tensor([[0, 1], [1, 1]])).flatten()
    tensor([0., 2.])
    """
    source, target = edges
    num_nodes = values.shape[2]
    into = target.expand_as(scores)
    greatest = scores.new_full((*scores.shape[:2], num_nodes), -torch.inf)
    greatest = greatest.scatter_reduce(2, into, scores.detach(), "amax")
    weights = (scores - greatest.gather(2, into)).exp()
    total = weights.new_zeros(*scores.shape[:2], num_nodes).scatter_add(2, into, weights)
    shares = (weights / total.gather(2, into)).unsqueeze(-1).to(values.dtype)
    return torch.zeros_like(values).index_add(2, target, shares * values.index_select(2, source))
