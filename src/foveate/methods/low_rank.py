"""Low-rank adapters (LoRA) beside the projections of a frozen model, at work for the length of a ``with`` block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """x A B / √r, nothing at first: rank-stabilised LoRA with α = 1 as in Kalajdzievski, arXiv 2312.03732."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.down = nn.Parameter(torch.empty(rank, layer.in_features, **like))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down.mT @ self.up.mT / math.sqrt(len(self.down))


class Adapters(nn.Module):
    """A `LowRank` for each linear layer of a model whose name ends in one of ``names``."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], rank: int) -> None:
        super().__init__()
        found = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in names
        }
        if not found:
            raise ValueError(f"{type(model).__name__} has no linear layers called {', '.join(names)}")
        self.beside = nn.ModuleDict({name.replace(".", "/"): LowRank(layer, rank) for name, layer in found.items()})

    @contextmanager
    def at_work(self, model: nn.Module, where: Mapping[str, Tensor]) -> Iterator[None]:
        """Add what they make of each token; ``where`` (B, N) marks the tokens by a layer's last name, if not all."""
        handles = []
        try:
            for key, low in self.beside.items():
                name = key.replace("/", ".")
                mask = where.get(name.rpartition(".")[2])
                handles.append(model.get_submodule(name).register_forward_hook(_adding(low, mask)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _adding(low: nn.Module, mask: Tensor | None) -> Any:
    def add(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        more = low(args[0])
        return out + (more if mask is None else more * mask.unsqueeze(-1).to(more.dtype))

    return add
