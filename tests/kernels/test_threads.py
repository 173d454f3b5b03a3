"""How many threads a call wakes: by its sizes alone, one for what is done before another could begin."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from tests.support.native_checks import needs_native

from foveate import attend, causal, neighborhood, recur, sinks, topk_blocks, window
from foveate.kernels.cpu.loader import library
from foveate.layouts.kinds import Grid
from foveate.recurrence import causal_conv

pytestmark = needs_native


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_of(call: Callable[[], object]) -> int:
    found = library()
    assert found is not None
    found.foveate_threads_used.restype = ctypes.c_int64
    call()  # selections are built here
    found.foveate_threads_used()
    call()
    return int(found.foveate_threads_used())


def attends(num_queries: int, num_keys: int, heads: int, **options) -> Callable[[], object]:
    q, k = torch.randn(1, heads, num_queries, 64), torch.randn(1, heads, num_keys, 64)
    return lambda: attend(q, k, k, **options, impl="native")


def differentiates(tokens: int, heads: int, **options) -> Callable[[], object]:
    q = torch.randn(1, heads, tokens, 64, requires_grad=True)
    return lambda: attend(q, q, q, **options, impl="native").sum().backward()


def recurs(tokens: int, heads: int) -> Callable[[], object]:
    q, k, v = torch.randn(3, 1, heads, tokens, 64).unbind(0)
    return lambda: recur(q, k, v, impl="native")


def convolves(tokens: int) -> Callable[[], object]:
    x, weight = torch.randn(1, tokens, 512), torch.randn(512, 4)
    return lambda: causal_conv(x, weight)


GRID = {"pattern": neighborhood((3, 3)), "layout": Grid(16, 64)}
SMALL = {
    "a decoding step": attends(1, 100, 4, pattern=causal),
    "short": attends(40, 40, 2, pattern=causal),
    "lists": attends(60, 60, 2, pattern=window(8) & causal | sinks(2)),
    "backward": differentiates(40, 2, pattern=causal),
    "a dynamic pattern": attends(128, 128, 1, pattern=topk_blocks(64, k=1) & causal),
    "a step of a state": recurs(1, 4),
    "a state": recurs(20, 2),
    "a convolution's step": convolves(1),
}
LARGE = {
    "decoding": attends(1, 40_000, 4, pattern=causal),
    "long": attends(900, 900, 4, pattern=causal),
    "lists": attends(900, 900, 4, pattern=window(300) & causal | sinks(2)),
    "backward": differentiates(600, 4, pattern=causal),
    "windows on a grid": attends(1024, 1024, 16, **GRID),
    "a state": recurs(900, 4),
    "a convolution": convolves(2000),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_calls_stay_on_one_thread(name: str) -> None:
    assert threads_of(SMALL[name]) == 1


@pytest.mark.parametrize("name", LARGE)
def test_large_calls_share_their_work(name: str) -> None:
    assert threads_of(LARGE[name]) == 2
