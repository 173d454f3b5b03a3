"""Attention on grids, written out: regions by loops, softmax over whole tables, and what benchmarks measured."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def boxes(dims: tuple[int, ...], sides: tuple[int, ...]) -> list[list[int]]:
    """The tokens of each box of these sides that a grid is cut into, boxes and tokens row by row."""
    found: dict[tuple[int, ...], list[int]] = {}
    for token, place in enumerate(itertools.product(*map(range, dims))):
        found.setdefault(tuple(p // side for p, side in zip(place, sides, strict=True)), []).append(token)
    return [found[key] for key in sorted(found)]


def heads_of(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Tokens (B, N, C) through a linear map, as heads (B, H, N, D)."""
    y = x @ weight.T if bias is None else x @ weight.T + bias
    return y.view(*x.shape[:2], heads, -1).permute(0, 2, 1, 3)


def joined(y: Tensor) -> Tensor:
    return y.permute(0, 2, 1, 3).flatten(2)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Softmax over whole tables of logits, what the mask hides left out."""
    logits = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    return torch.softmax(logits.masked_fill(~mask, float("-inf")), -1) @ v


def of_blocks(table: Tensor, boxes: list[list[int]]) -> Tensor:
    """Pairs of tokens (..., N, N) of pairs of boxes (..., R, R)."""
    box = torch.empty(sum(map(len, boxes)), dtype=torch.long)
    for number, tokens in enumerate(boxes):
        box[tokens] = number
    return table[..., box, :][..., box]


def measured(row: str) -> list[dict[str, Any]]:
    """What benchmarks/chosen_cpu.py found of a mechanism."""
    return json.loads((RESULTS / "chosen_cpu.json").read_text(encoding="utf-8"))["rows"][row]


def faster_from(row: str, tokens: int, factor: float) -> None:
    """AssertionError unless it was measured so many times as fast as dense attention from that length on."""
    lines = [line for line in measured(row) if line["tokens"] >= tokens]
    assert {line["task"] for line in lines} == {"forward", "forward + backward"}
    assert all(line["seconds"]["dense"] > factor * line["seconds"]["sparse"] for line in lines), lines
