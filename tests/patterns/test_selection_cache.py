"""Selections are kept by what a pattern holds: never stale, never another pattern's, never without bound."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from foveate import attend, causal, full, key_padding, sinks, window
from foveate.layouts.kinds import Sequence
from foveate.patterns import Pattern
from foveate.patterns.rules.sequence import ByDistance
from foveate.patterns.select.cache import SELECTIONS, SelectionCache, bytes_of
from foveate.patterns.select.selection import Selection


@dataclass(frozen=True, eq=False, repr=False)
class Every(ByDistance):
    """Keys a multiple of n before the query."""

    n: int

    text = "every"
    sees_future = False

    def visible(self, batch, head, q, k):
        return (q >= k) & ((q - k) % self.n == 0)


class Slotted(Pattern):
    __slots__ = ("n",)
    text = "slotted"

    def __init__(self, n: int) -> None:
        self.n = n

    def visible(self, batch, head, q, k):
        return (q - k).abs() % self.n == 0


class Ruled(Pattern):
    """By a function; of that much can be read that is no field of it."""

    text = "ruled"

    def __init__(self, rule) -> None:
        self.rule = rule

    def visible(self, batch, head, q, k):
        return self.rule(q, k)


def dense(pattern: Pattern, n: int = 70) -> Tensor:
    q = torch.empty(1, 1, n, 1)
    return pattern.select(q, q).to_dense()[0, 0]


def by_rule(rule, n: int = 70) -> Tensor:
    return rule(torch.arange(n)[:, None], torch.arange(n))


@pytest.mark.parametrize("kind", [Every, Slotted])
def test_equal_texts_do_not_make_equal_patterns(kind: type) -> None:
    assert kind(2) == kind(2) and hash(kind(2)) == hash(kind(2))
    assert kind(2) != kind(3) and kind(2) & causal != kind(3) & causal
    assert (kind(2) | sinks(1)) == (kind(2) | sinks(1))
    for pattern in (kind(2), kind(3), kind(5) & full, ~kind(7)):
        index = torch.arange(70)
        assert torch.equal(dense(pattern), pattern.visible(0, 0, index[:, None], index))
    q = torch.randn(3, 1, 2, 70, 8).unbind(0)
    assert not torch.equal(attend(*q, kind(2)), attend(*q, kind(3)))


def test_a_pattern_that_was_changed_gives_another_selection() -> None:
    pattern = Slotted(2)
    before = dense(pattern)
    pattern.n = 3
    assert not torch.equal(dense(pattern), before)


@pytest.mark.parametrize("change", ["in place", "data", "numpy", "inference"])
def test_masks_changed_by_whichever_way_give_no_stale_selection(change: str) -> None:
    with torch.inference_mode(change == "inference"):
        mask = torch.ones(1, 70, dtype=torch.bool)
        pattern = key_padding(mask) & causal
        assert torch.equal(dense(pattern), torch.ones(70, 70).tril().bool())
        if change == "data":
            mask.data[0, 5] = False
        elif change == "numpy":
            mask.numpy()[0, 5] = False
        else:
            mask[0, 5] = False
        expected = torch.ones(70, 70).tril().bool() & torch.arange(70).ne(5)
        assert torch.equal(dense(pattern), expected)


def test_functions_are_known_by_what_they_read() -> None:
    table, step = torch.arange(70) % 3, 2

    def rule(q, k):
        return (table[q] == table[k]) & ((q - k) % step == 0)

    pattern = Ruled(rule)
    assert torch.equal(dense(pattern), by_rule(rule))
    step = 5
    assert torch.equal(dense(pattern), by_rule(rule))
    table.numpy()[:] = 0
    assert torch.equal(dense(pattern), by_rule(rule))
    q = torch.empty(1, 1, 70, 1)
    assert pattern.select(q, q) is Ruled(rule).select(q, q)


def test_what_cannot_be_told_is_not_kept() -> None:
    class Threshold:
        value = 2

        def __call__(self, q, k):
            return q - k > self.value

    rule = Threshold()
    pattern = Ruled(rule)
    assert torch.equal(dense(pattern), by_rule(rule))
    rule.value = 30
    assert torch.equal(dense(pattern), by_rule(rule))


def test_equal_masks_in_new_memory_find_the_selection_again() -> None:
    q, mask = torch.empty(2, 1, 70, 1), torch.rand(2, 70) > 0.3
    assert key_padding(mask).select(q, q) is key_padding(mask.clone()).select(q, q)


def test_a_selection_made_without_gradients_serves_with_them() -> None:
    q, k, v = (torch.randn(1, 1, 70, 8, requires_grad=True) for _ in "qkv")
    pattern = window(9) & causal | sinks(3)
    with torch.inference_mode():
        attend(q, k, v, pattern, impl="tiles")
    attend(q, k, v, pattern, impl="tiles").sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def selection(n: int) -> Selection:
    q = torch.empty(1, 1, n, 1)
    return (window(5) | sinks(1)).select(q, q)


def ask(cache: SelectionCache, n: int) -> Selection:
    return cache.get(causal, Sequence(n), n, n, 64, "cpu", lambda: selection(n))


def test_the_cache_holds_so_many_bytes_and_drops_what_was_used_longest_ago() -> None:
    size = bytes_of(selection(640))
    assert size >= sum(x.nbytes for x in vars(selection(640)).values() if isinstance(x, Tensor))
    cache = SelectionCache(most_bytes=4 * size)
    first = ask(cache, 640)
    for n in range(600, 640):
        ask(cache, n)
        assert ask(cache, 640) is first, "used again and again"
        assert 0 < cache.bytes <= cache.most_bytes and len(cache) <= 6
    large = ask(cache, 64_000)
    assert len(cache) == 1 and cache.bytes > cache.most_bytes and ask(cache, 64_000) is large
    cache.clear()
    assert len(cache) == cache.bytes == 0


def test_a_selection_of_the_cache_is_counted_whole() -> None:
    made = selection(640)
    promised = bytes_of(made)
    for name in ("unpacked_masks", "tile_rows", "column_rows", "masked_counts"):
        getattr(made, name)
    assert promised >= sum(x.nbytes for x in vars(made).values() if isinstance(x, Tensor))


def test_threads_select_at_once() -> None:
    masks = [torch.rand(1, 70) > 0.5 for _ in range(40)]
    wrong: list[object] = []

    def work() -> None:
        try:
            wrong.extend(i for i, mask in enumerate(masks) if not torch.equal(dense(shared[i])[3], mask[0]))
        except Exception as error:  # the test's own thread raises it
            wrong.append(error)

    shared = [key_padding(mask) for mask in masks]
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_static_patterns_and_those_with_tensors_share_one_budget() -> None:
    SELECTIONS.clear()
    dense(window(3) | sinks(2))
    dense(key_padding(torch.ones(1, 70, dtype=torch.bool)))
    assert len(SELECTIONS) == 2
