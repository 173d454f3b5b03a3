"""The I/O model of exact attention against counted loads and stores, on both sides of M = d²."""

from __future__ import annotations

import itertools
import math
from importlib import import_module
from typing import Any

import pytest
import torch

from foveate import attend, full
from foveate.attention.impl import tiles as implementation
from foveate.catalogue import tiers
from foveate.catalogue.tiers import row
from foveate.lab.probes.attention_io import Memory, Tiles, accesses, attend_counted, choose_tiles


def counted(tokens: int, dim: int, tiles: Tiles, size: int) -> int:
    q, k, v = torch.randn(3, tokens, dim, dtype=torch.float64)
    memory = Memory(size)
    out = attend_counted(q, k, v, tiles, memory)
    expected = (q @ k.T / math.sqrt(dim)).softmax(-1) @ v
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    return memory.accesses


def spans(length: int, size: int) -> list[int]:
    return [min(size, length - first) for first in range(0, length, size)]


@pytest.mark.paper("FlashAttention-IO-optimality", "definition")
@pytest.mark.parametrize(("tokens", "dim"), [(23, 5), (32, 8), (17, 3)])
def test_counts_are_sums_over_tiles_written_out(tokens: int, dim: int) -> None:
    for rows, columns in ((4, 7), (tokens, 1), (5, 5), (1, tokens)):
        flash = sum(2 * r * dim + sum(2 * c * dim for c in spans(tokens, columns)) for r in spans(tokens, rows))
        tiles = Tiles("flash", rows, columns)
        assert counted(tokens, dim, tiles, 10**6) == accesses(tokens, dim, tiles) == flash
    for side in (1, 2, 4, tokens):
        parts, channels = spans(tokens, side), spans(dim, side)
        logits = sum((r + c) * b for r in parts for c in parts for b in channels)  # of queries and of keys
        logits += sum(r * c for r in parts for c in parts) + sum(2 * r for r in parts)
        read = sum(2 * r + r * b + sum(r * c + c * b for c in parts) for r in parts for b in channels)
        tiles = Tiles("blocked", side, side)
        assert counted(tokens, dim, tiles, 10**6) == accesses(tokens, dim, tiles) == logits + read


@pytest.mark.paper("FlashAttention-IO-optimality", "works_when")
def test_above_d_squared_counts_fall_as_one_over_m_and_below_as_its_root() -> None:
    """Half the moves for twice the memory, and for four times the memory."""
    dim, tokens = 8, 384
    above = [counted(tokens, dim, choose_tiles(tokens, dim, size), size) for size in (256, 512, 1024)]
    assert all(choose_tiles(tokens, dim, size).algorithm == "flash" for size in (256, 512, 1024))
    for more, fewer in itertools.pairwise(above):
        assert 0.45 < fewer / more < 0.58
    dim, tokens = 64, 48
    sizes = (30, 120, 480)
    assert all(choose_tiles(tokens, dim, size).algorithm == "blocked" for size in sizes)
    below = [accesses(tokens, dim, choose_tiles(tokens, dim, size)) for size in sizes]
    for more, fewer in itertools.pairwise(below):
        assert 0.35 < fewer / more < 0.6
    assert counted(tokens, dim, choose_tiles(tokens, dim, 480), 480) == below[2]


@pytest.mark.paper("FlashAttention-IO-optimality", "works_when")
@pytest.mark.parametrize("size", [40, 150, 700])
def test_the_chooser_takes_what_moves_least_of_all_that_fits(size: int) -> None:
    tokens, dim = 14, 10
    best = choose_tiles(tokens, dim, size)
    assert counted(tokens, dim, best, size) == accesses(tokens, dim, best)  # and it fits
    tried = [Tiles("flash", r, c) for r in range(1, tokens + 1) for c in range(1, tokens + 1)]
    tried += [Tiles("blocked", side, side) for side in range(1, tokens + 1)]
    fitting = []
    for tiles in tried:
        try:
            fitting.append(counted(tokens, dim, tiles, size))
        except ValueError as error:
            assert "do not fit" in str(error)
    assert accesses(tokens, dim, best) <= min(fitting)
    assert best.algorithm == ("flash" if size >= dim * dim else "blocked")


@pytest.mark.paper("FlashAttention-IO-optimality", "works_when")
def test_the_probe_confirms_it() -> None:
    found = row("attention_io").run(tokens=40, dim=8, memories=(24, 48, 64, 128, 512))
    assert found.confirmed
    assert found.figures["greatest difference from the model"] == 0
    with pytest.raises(ValueError, match="too small"):
        choose_tiles(16, 8, 5)


@pytest.mark.paper("FlashAttention-IO-optimality", "works_when")
@pytest.mark.parametrize(("tokens", "dim"), [(256, 8), (192, 32), (200, 16)])
def test_the_tiles_of_attend_move_what_the_model_says(tokens: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, gather = [], implementation._Work.gather

    def noted(self, x, batch, head):
        found = gather(self, x, batch, head)
        moved.append(found.numel())
        return found

    monkeypatch.setattr(implementation._Work, "gather", noted)
    q, k, v = torch.randn(3, 1, 1, tokens, dim)
    with torch.no_grad():
        out = attend(q, k, v, full, impl="tiles")
    size = implementation.TILE
    assert q.numel() + sum(moved) + out.numel() == accesses(tokens, dim, Tiles("flash", size, size))


@pytest.mark.parametrize("error", [-1e-6, 1e-6])
def test_inexact_outputs_refute_it(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("foveate.lab.probes.attention_io")
    counted = module.attend_counted
    monkeypatch.setattr(module, "attend_counted", lambda *args: counted(*args) + error)
    sizes: dict[str, Any] = tiers.row("attention_io").tiny
    assert module.attention_io(**sizes).verdict == "refuted"
