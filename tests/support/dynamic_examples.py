"""Examples of every dynamic pattern, and their definitions in plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from foveate.patterns import Pattern, Scene, mass_blocks, topk_blocks, topk_keys, vertical_slash
from foveate.patterns.select.dense import dense_mask

Mask = list[list[list[set[int]]]]  # the keys that each query of each head of each batch entry sees


class Shape(NamedTuple):
    batch: int
    heads: int
    groups: int
    num_queries: int
    num_keys: int


SHAPES = (Shape(2, 4, 2, 37, 37), Shape(1, 2, 1, 130, 130), Shape(1, 2, 2, 9, 50), Shape(2, 2, 1, 1, 41))
ACROSS = (Shape(1, 2, 1, 20, 13),)  # more queries than keys

PATTERNS = (
    topk_blocks(8, k=2),
    topk_blocks(5, k=3, shared=True),
    topk_blocks(16, k=2, per="block"),
    topk_blocks(7, k=3, per="block", shared=True),
    topk_blocks(64, k=1),
    topk_blocks(8, k=2, causal=False),
    topk_blocks(6, k=2, per="block", shared=True, causal=False),
    mass_blocks(4, 0.5),
    mass_blocks(8, 0.7, shared=True),
    mass_blocks(3, 0.4, per="block"),
    mass_blocks(8, 0.3, causal=False),
    mass_blocks(16, 0.6, per="block", causal=False),
    vertical_slash(3, 4),
    vertical_slash(5, 1, last=7),
    topk_keys(3),
    topk_keys(5, causal=False),
)
CAREFUL = tuple(p for p in PATTERNS if p.is_causal)
AHEAD = tuple(p for p in PATTERNS if p.chooses_ahead)

every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES + ACROSS, ids=str)


def draw(shape: Shape, dim: int = 6) -> tuple[Tensor, Tensor]:
    q = torch.randn(shape.batch, shape.heads, shape.num_queries, dim, dtype=torch.float64)
    return 3 * q, torch.randn(shape.batch, shape.groups, shape.num_keys, dim, dtype=torch.float64)


def scene_of(q: Tensor, k: Tensor) -> Scene:
    return Scene(q.shape[2], k.shape[2], q=q, k=k)


def mask_of(pattern: Pattern, q: Tensor, k: Tensor) -> Tensor:
    return dense_mask(pattern.resolve(scene_of(q, k)), scene_of(q, k))


def defined(pattern: Pattern, q: Tensor, k: Tensor) -> Tensor:
    """The mask by the definition of the pattern."""
    name = type(pattern).__name__
    by_name: dict[str, Callable[[Any, Tensor, Tensor], Mask]] = {
        "TopBlocks": _blocks,
        "MassBlocks": _blocks,
        "VerticalSlash": _lines,
        "TopKeys": _keys,
    }
    seen = by_name[name](pattern, q, k)
    num_queries, num_keys = q.shape[2], k.shape[2]
    mask = torch.zeros(len(seen), len(seen[0]), num_queries, num_keys, dtype=torch.bool)
    for b, heads in enumerate(seen):
        for h, rows in enumerate(heads):
            for i, keys in enumerate(rows):
                keep = [j for j in keys if pattern.sees_future or j <= i + num_keys - num_queries]
                mask[b, h, i, keep] = True
    return mask


def first_best(scores: dict[int, float], count: int) -> list[int]:
    return sorted(scores, key=lambda j: (-scores[j], j))[:count]


def softmax(scores: dict[int, float]) -> dict[int, float]:
    top = max(scores.values(), default=0.0)
    total = sum(math.exp(s - top) for s in scores.values())
    return {j: math.exp(s - top) / total for j, s in scores.items()}


def _blocks(pattern: Any, q: Tensor, k: Tensor) -> Mask:
    groups = k.shape[1]
    selections = groups if pattern.shared else q.shape[1]
    return [
        [_rows_of_blocks(pattern, q, k, b, s, q.shape[1] // selections) for s in range(selections)]
        for b in range(q.shape[0])
    ]


def _rows_of_blocks(pattern: Any, q: Tensor, k: Tensor, b: int, s: int, width: int) -> list[set[int]]:
    block, offset, num_keys = pattern.block, k.shape[2] - q.shape[2], k.shape[2]
    heads, group = range(s * width, (s + 1) * width), q.shape[1] // k.shape[1]
    rows = []
    for i in range(q.shape[2]):
        own = (i + offset) // block
        mates = [i] if pattern.per == "query" else [j for j in range(q.shape[2]) if (j + offset) // block == own]
        candidates = range(max(own, 0)) if pattern.causal else range(-(-num_keys // block))
        of_heads = []
        for h in heads:
            query, keys = q[b, h, mates].mean(0), k[b, h // group]
            scores = {j: float(query @ keys[j * block : (j + 1) * block].mean(0)) for j in candidates}
            of_heads.append({j: s / math.sqrt(q.shape[3]) for j, s in scores.items()})
        chosen = _chosen_blocks(pattern, of_heads) | ({own} if pattern.causal else set())
        rows.append({j for j in range(num_keys) if j // block in chosen})
    return rows


def _chosen_blocks(pattern: Any, of_heads: list[dict[int, float]]) -> set[int]:
    is_mass = str(pattern).startswith("mass")
    if is_mass or pattern.shared:
        of_heads = [softmax(scores) for scores in of_heads]
    total = {j: sum(scores[j] for scores in of_heads) / len(of_heads) for j in of_heads[0]}
    if not is_mass:
        return set(first_best(total, pattern.budget - pattern.causal))
    chosen: set[int] = set()
    for j in first_best(total, len(total)):
        if sum(total[c] for c in chosen) < pattern.budget:
            chosen.add(j)
    return chosen


def _lines(pattern: Any, q: Tensor, k: Tensor) -> Mask:
    num_queries, num_keys = q.shape[2], k.shape[2]
    offset, group = num_keys - num_queries, q.shape[1] // k.shape[1]
    seen: Mask = []
    for b in range(q.shape[0]):
        seen.append([])
        for h in range(q.shape[1]):
            columns, distances = dict.fromkeys(range(num_keys), 0.0), dict.fromkeys(range(num_keys), 0.0)
            for i in range(max(0, num_queries - pattern.last, -offset), num_queries):
                scores = {j: float(q[b, h, i] @ k[b, h // group, j]) for j in range(i + offset + 1)}
                for j, weight in softmax({j: s / math.sqrt(q.shape[3]) for j, s in scores.items()}).items():
                    columns[j] += weight
                    distances[i + offset - j] += weight
            distances[0] = math.inf
            chosen, apart = first_best(columns, pattern.vertical), first_best(distances, pattern.slash)
            rows = ({*chosen, *(i + offset - d for d in apart if d <= i + offset)} for i in range(num_queries))
            seen[b].append([{j for j in row if j <= i + offset} for i, row in enumerate(rows)])
    return seen


def _keys(pattern: Any, q: Tensor, k: Tensor) -> Mask:
    num_queries, num_keys = q.shape[2], k.shape[2]
    offset, group = num_keys - num_queries, q.shape[1] // k.shape[1]

    def row(b: int, h: int, i: int) -> set[int]:
        reach = max(i + offset + 1, 0) if pattern.causal else num_keys
        scores = {j: float(q[b, h, i] @ k[b, h // group, j]) for j in range(reach)}
        return set(first_best(scores, pattern.count))

    return [[[row(b, h, i) for i in range(num_queries)] for h in range(q.shape[1])] for b in range(q.shape[0])]
