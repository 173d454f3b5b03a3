"""Ranges of keys against masks, pair by pair."""

from __future__ import annotations

import random

import pytest
import torch

from foveate import (
    Pattern,
    blocks,
    causal,
    dilated,
    every_block,
    full,
    global_tokens,
    local_blocks,
    per_head,
    power_of_two,
    prefix,
    random_blocks,
    sinks,
    strided,
    window,
)
from foveate.patterns.ranges import complement, intersection, most_needed, needed_ranges, union, visible_ranges

LEAVES = (
    lambda: full,
    lambda: causal,
    lambda: window(random.randint(1, 9), random.randint(0, 5)),
    lambda: sinks(random.randint(1, 6)),
    lambda: prefix(random.randint(1, 6)),
    lambda: blocks(random.randint(1, 9)),
    lambda: strided(random.randint(1, 5)),
    lambda: dilated(random.randint(1, 3), random.randint(1, 5)),
    lambda: power_of_two(random.randint(1, 5)),
    lambda: local_blocks(random.randint(1, 5), random.randint(1, 3)),
    lambda: every_block(random.randint(1, 5), 3, random.randint(0, 2)),
    lambda: global_tokens([2, 11]),  # asked pair by pair
    lambda: random_blocks(3, 0.4, seed=1),
)
LENGTH = 41


def tree(depth: int = 2) -> Pattern:
    kind = random.choice(("leaf", "and", "or", "not")) if depth else "leaf"
    if kind == "leaf":
        return random.choice(LEAVES)()
    if kind == "not":
        return ~tree(depth - 1)
    return tree(depth - 1) & tree(depth - 1) if kind == "and" else tree(depth - 1) | tree(depth - 1)


def members(ranges: tuple[tuple[int, int], ...]) -> list[int]:
    numbers = [number for first, end in ranges for number in range(first, end)]
    assert numbers == sorted(set(numbers)), f"ranges overlap or are out of order: {ranges}"
    return numbers


@pytest.mark.parametrize("number", range(40))
def test_ranges_of_any_pattern_are_its_mask(number: int) -> None:
    pattern = LEAVES[number]() if number < len(LEAVES) else tree()
    if number % 5 == 4:
        pattern = per_head([pattern, tree(1)])
    mask = pattern.mask(LENGTH)[0]  # (heads, N, M)
    for query in random.sample(range(LENGTH), 12):
        for head in range(pattern.heads):
            seen = members(visible_ranges(pattern, query, LENGTH, head))
            assert seen == mask[head, query].nonzero().flatten().tolist(), pattern
        needed = members(needed_ranges(pattern, query))
        later = mask[:, query:, :query].any(1).any(0).nonzero().flatten().tolist()
        assert set(later) <= set(needed), pattern
        assert all(key < query for key in needed)
        most = most_needed(pattern)
        assert most is None or len(needed) <= most, pattern


@pytest.mark.parametrize(
    ("pattern", "most"),
    [(window(7, 0), 7), ((window(7, 2) | sinks(4)) & causal, 11), (per_head([window(3), window(9)]) & causal, 9)],
    ids=str,
)
def test_what_windows_need_is_bounded_by_their_length(pattern: Pattern, most: int) -> None:
    assert most_needed(pattern) == most
    assert len(members(needed_ranges(pattern, 10**9))) == most


def test_sets_of_ranges_are_sets() -> None:
    for _ in range(200):
        one, other = ({random.randrange(30) for _ in range(random.randint(0, 25))} for _ in range(2))
        a, b = (union(*(((x, x + 1),) for x in numbers)) for numbers in (one, other))
        assert members(union(a, b)) == sorted(one | other)
        assert members(intersection(a, b)) == sorted(one & other)
        assert members(complement(a, 30)) == sorted(set(range(30)) - one)


def test_questions_about_a_long_text_take_no_time() -> None:
    pattern = (window(1000, 0) | power_of_two(64) | sinks(4)) & causal
    assert len(visible_ranges(pattern, 2**39, 2**39 + 1)) < 45
    assert not torch.is_tensor(needed_ranges(pattern, 2**39))
