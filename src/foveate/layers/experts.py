"""Experts that tokens choose: tokens sorted by expert, each expert run once on all of its own, and put back."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu


class SortedExperts(nn.Module):
    """A mixture of ``experts`` two-layer networks with GELU, of which each token takes the ``chosen`` of best gate.

    Outputs are weighted with the softmax over all gates, not renormalised over those chosen. Tokens are sorted by
    expert, so that each expert's weights are read once, for all of its tokens side by side; experts that nobody chose
    are not run. What comes out is put back where its tokens were, and added up. With ``tasks`` there is a gate for each
    task (M³ViT's), named in the call.

    Sarkar et al., Edge-MoE: Memory-Efficient Multi-Task Vision Transformer Architecture with Task-level Sparsity via
    Mixture-of-Experts, arXiv 2305.18691.

    >>> layer = SortedExperts(8, hidden=16, experts=4, chosen=2, tasks=3)
    >>> layer(torch.randn(2, 5, 8), task=1).shape
    torch.Size([2, 5, 8])

    Raises ValueError for sizes below 1, more chosen than there are, and a task that there is not.
    """

    def __init__(self, dim: int, *, hidden: int, experts: int = 16, chosen: int = 4, tasks: int = 1) -> None:
        super().__init__()
        if min(dim, hidden, experts, tasks) < 1 or not 1 <= chosen <= experts:
            raise ValueError(
                "sizes are at least 1, and no more experts are chosen than there are;"
                f" got {dim}, {hidden}, {experts} experts, {chosen} chosen, {tasks} tasks"
            )
        self.chosen = chosen
        self.gates = nn.ModuleList(nn.Linear(dim, experts, bias=False) for _ in range(tasks))
        self.first = nn.ModuleList(nn.Linear(dim, hidden) for _ in range(experts))
        self.second = nn.ModuleList(nn.Linear(hidden, dim) for _ in range(experts))

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        """Tokens (..., C) to tokens."""
        if not 0 <= task < len(self.gates):
            raise ValueError(f"there are tasks 0 to {len(self.gates) - 1}; got {task}")
        tokens = x.reshape(-1, x.shape[-1])
        gates = self.gates[task](tokens).softmax(-1)
        shares, experts = gates.topk(self.chosen, dim=-1)  # (T, chosen)
        order, counts = sorted_by(experts.flatten(), len(self.first))
        rows = tokens[order // self.chosen].split(counts)
        done = [
            second(gelu(first(own)))
            for own, first, second in zip(rows, self.first, self.second, strict=True)
            if len(own)
        ]
        if not done:
            return torch.zeros_like(x)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        outs = torch.cat(done)[back].view(-1, self.chosen, x.shape[-1])
        return (outs * shares.unsqueeze(-1)).sum(1).view_as(x)


def sorted_by(experts: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """The order (T,) in which choices of experts stand sorted, each expert's as they came, and how many it has.

    >>> sorted_by(torch.tensor([2, 0, 2, 0, 3]), 4)
    (tensor([1, 3, 0, 2, 4]), [2, 0, 2, 1])
    """
    return experts.argsort(stable=True), torch.bincount(experts, minlength=count).tolist()
