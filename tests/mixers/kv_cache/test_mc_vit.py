"""MC-ViT: memories of segments by loops; bounded, linear, and better than none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.formulas import follows
from tests.support.on_grids import heads_of
from torch import Tensor

from foveate.counting import count_operations
from foveate.mixers.kv_cache.mc_vit import MemoryConsolidation

SIZES: dict[str, Any] = {"segment": 6, "memory": 3, "segments": 2}


def lloyd(x: Tensor, drawn: list[int], iterations: int) -> list[list[int]]:
    """Groups of tokens (S, C) after k-means from those drawn; a group that is empty is its drawn token."""
    centres, groups = [x[i] for i in drawn], [[i] for i in drawn]
    for _ in range(iterations):
        label = [min(range(len(centres)), key=lambda c: float((t - centres[c]).square().sum())) for t in x]
        found = [[i for i, own in enumerate(label) if own == c] for c in range(len(centres))]
        centres = [x[own].mean(0) if own else centres[c] for c, own in enumerate(found)]
        groups = [own or [drawn[c]] for c, own in enumerate(found)]
    return groups


def groups_of(x: Tensor, number: int, select: str, count: int, iterations: int, seed: int) -> list[list[int]]:
    """The tokens (S, C) of segment ``number`` that each memory is a mean of."""
    drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed + number))[:count].tolist()
    if select == "random":
        return [[i] for i in drawn]
    if select == "kmeans":
        return lloyd(x, drawn, iterations)
    taken = [0]
    while len(taken) < count:
        gaps = [min(float((x[i] - x[j]).square().sum()) for j in taken) for i in range(len(x))]
        taken.append(max(range(len(x)), key=lambda i: gaps[i]))
    return [[i] for i in taken]


def formula(mixer: MemoryConsolidation, x: Tensor, select: str, iterations: int, seed: int) -> Tensor:
    """Segment by segment: softmax over its own keys and the memories of the two segments before it."""
    size, count, past = 6, 3, 2
    outs = []
    for entry in x:
        memories: list[Tensor] = []  # (K, C) tokens or means, whose keys and values are linear in them
        rows = []
        for number, first in enumerate(range(0, len(entry), size)):
            own = entry[first : first + size]
            seen = torch.cat([*memories[-past:], own])[None]
            q = heads_of(own[None], mixer.to_q.weight, None, 4)
            k, v = (heads_of(seen, part.weight, None, 2) for part in (mixer.to_k, mixer.to_v))
            k, v = (part.repeat_interleave(2, 1) for part in (k, v))
            mixed = torch.softmax(q @ k.mT / q.shape[3] ** 0.5, -1) @ v
            rows.append(mixed.permute(0, 2, 1, 3).flatten(2)[0] @ mixer.to_out.weight.T)
            if len(own) == size:
                groups = groups_of(own.detach(), number, select, count, iterations, seed)
                memories.append(torch.stack([own[group].mean(0) for group in groups]))
        outs.append(torch.cat(rows))
    return torch.stack(outs)


@pytest.mark.paper("MC-ViT", "definition")
@pytest.mark.paper("MC-ViT", "works_when")
@pytest.mark.parametrize("select", ["random", "coreset", "kmeans"])
@pytest.mark.parametrize("length", [30, 23])
def test_segments_attend_to_themselves_and_to_memories_of_segments_before_them(select: Any, length: int) -> None:
    mixer = MemoryConsolidation(12, 4, kv_heads=2, select=select, iterations=2, seed=5, **SIZES).double()
    x = torch.randn(2, length, 12, dtype=torch.float64, requires_grad=True)
    follows(mixer, lambda: mixer(x), lambda: formula(mixer, x, select, 2, 5), x)


@pytest.mark.paper("MC-ViT", "definition")
def test_all_tokens_as_memories_are_attention_to_all_segments_so_far() -> None:
    mixer = MemoryConsolidation(12, 4, segment=5, memory=5, segments=9, select="coreset").double()
    x = torch.randn(2, 20, 12, dtype=torch.float64, requires_grad=True)
    place = torch.arange(20) // 5
    seen = place[:, None] >= place

    def dense() -> Tensor:
        q, k, v = (heads_of(x, part.weight, None, 4) for part in (mixer.to_q, mixer.to_k, mixer.to_v))
        logits = (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~seen, float("-inf"))
        return (torch.softmax(logits, -1) @ v).permute(0, 2, 1, 3).flatten(2) @ mixer.to_out.weight.T

    follows(mixer, lambda: mixer(x), dense, x)


@pytest.mark.paper("MC-ViT", "works_when")
@pytest.mark.parametrize("select", ["random", "coreset", "kmeans"])
def test_memory_is_bounded_a_segment_and_time_linear_in_their_number(select: Any) -> None:
    mixer = MemoryConsolidation(16, 4, segment=8, memory=2, segments=3, select=select)
    state, kept = mixer.init_state(1), []
    x = torch.randn(1, 8 * 8, 16)
    outs = []
    for number in range(8):  # as it streams
        out, state = mixer.prefill(x[:, 8 * number : 8 * number + 8], state)
        outs.append(out)
        kept.append(state.k.shape[2])
    assert kept == [2, 4, 6, 6, 6, 6, 6, 6]
    torch.testing.assert_close(torch.cat(outs, 1), mixer(x))
    assert mixer.state_bytes(8 * 8) == state.k.nbytes + state.v.nbytes == mixer.state_bytes(80 * 8)
    pairs = []
    for segments in (5, 10, 20):
        with count_operations() as counted:
            mixer(torch.randn(1, 8 * segments, 16))
        pairs.append(counted["attend"].pairs)
    assert pairs[2] - pairs[1] == 2 * (pairs[1] - pairs[0])  # so many more for so many segments more
    assert pairs[1] - pairs[0] == 5 * 4 * 8 * (8 + 6)


@pytest.mark.paper("MC-ViT", "works_when")
def test_clusters_and_coresets_cover_a_segment_of_unequal_kinds_better_than_tokens_at_random() -> None:
    """Few tokens of rare kinds among many of a common one: what a query for a rare kind gets, a segment later."""
    common = torch.randn(1, 1, 32, dtype=torch.float64)
    kinds = 3 * torch.randn(40, 4, 32, dtype=torch.float64)
    tokens = torch.cat((common.expand(40, 44, -1), kinds), 1) + 0.05 * torch.randn(40, 48, 32, dtype=torch.float64)
    apart = {}
    for select in ("random", "coreset", "kmeans"):
        mixer: Any = MemoryConsolidation(32, 4, segment=48, memory=8, select=select, iterations=5).double()
        shares = mixer.shares_of(tokens, 0)
        assert torch.allclose(shares.sum(2), torch.ones(40, 8, dtype=torch.float64))
        gaps = torch.cdist(kinds, shares @ tokens).amin(2)
        apart[select] = float(gaps.mean())
    assert apart["coreset"] < 0.2 * apart["random"] and apart["kmeans"] < apart["random"]


def test_what_cannot_be_is_refused() -> None:
    for options, words in (({"memory": 7}, "as many tokens as memories"), ({"select": "best"}, "selected by random")):
        with pytest.raises(ValueError, match=words):
            MemoryConsolidation(8, 2, **SIZES | options)
    mixer = MemoryConsolidation(8, 2, **SIZES)
    _, state = mixer.prefill(torch.randn(1, 8, 8), mixer.init_state(1))
    with pytest.raises(ValueError, match="none can follow"):
        mixer.prefill(torch.randn(1, 6, 8), state)
