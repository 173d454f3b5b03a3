"""Rectangles cut out of patterns."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.support.heads import qkv

from foveate import causal, key_padding, window
from foveate.patterns import Pattern, Scene, Sequence, documents, sinks
from foveate.patterns.part import Parts
from foveate.patterns.rules.dynamic import topk_blocks


@pytest.mark.parametrize("pattern", [causal, window(4, 1) | sinks(2), documents([10, 3, 24]), topk_blocks(4, 2)])
def test_a_part_of_a_pattern_is_that_part_of_its_mask(pattern: Pattern) -> None:
    q, k, _ = qkv(29, 37)
    scene = Scene(29, 37, Sequence(), q.detach(), k.detach())
    parts = Parts.of(pattern, scene)
    whole = parts.part(slice(0, 29), slice(0, 37)).mask(29, 37)
    for step, (first, last), (left, right) in itertools.product((1, 3), ((0, 29), (5, 21)), ((0, 37), (7, 30))):
        part = parts.part(slice(first, last, step), slice(left, right))
        expected = whole[:, :, first:last:step, left:right]
        count = expected.shape[2]
        assert torch.equal(part.mask(count, right - left), expected)
        cut = part.select(q[:, :, :count], k[:, :, left:right], tile=8).to_dense()
        assert torch.equal(cut.expand_as(expected), expected)


def test_chunks_that_no_query_sees_are_left_out() -> None:
    parts = Parts.of(window(4, 0), Scene(40, 40))
    chunks = [slice(start, start + 10) for start in range(0, 40, 10)]
    assert parts.worth(slice(22, 30), chunks) == chunks[1:3]
    nothing = Parts.of(key_padding(torch.zeros(2, 40, dtype=torch.bool)), Scene(40, 40))
    assert nothing.worth(slice(0, 40), chunks) == chunks[:1]
