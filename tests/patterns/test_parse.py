"""Patterns from text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from tests.patterns.test_patterns import trees
from tests.support.pattern_examples import ON_SEQUENCES, STATIC

from foveate.patterns import Pattern, causal, key_padding, neighborhood, parse, per_head, sinks, topk_blocks, window


@pytest.mark.parametrize("pattern", STATIC, ids=str)
def test_parse_is_the_inverse_of_str(pattern: Pattern) -> None:
    assert parse(str(pattern)) == pattern
    assert type(parse(str(pattern))) is type(pattern)


@pytest.mark.parametrize("pattern", ON_SEQUENCES, ids=str)
def test_what_is_read_means_the_same(pattern: Pattern) -> None:
    assert torch.equal(parse(str(pattern)).mask(23, 31), pattern.mask(23, 31))


@settings(max_examples=60, deadline=None)
@given(trees)
def test_any_tree_survives(pattern: Pattern) -> None:
    again = parse(str(pattern))
    assert again == pattern
    assert torch.equal(again.mask(19), pattern.mask(19))


def test_reads_what_people_write() -> None:
    assert parse(" window(4)&causal|sinks( 2 ) ") == window(4) & causal | sinks(2)
    assert parse("per_head([window(4), causal & ~sinks(1)])") == per_head([window(4), causal & ~sinks(1)])
    assert parse("neighborhood((3, 5), causal=(True, False))") == neighborhood((3, 5), causal=(True, False))
    assert parse("window(left=4, right=0)") == window(4, 0)
    assert parse("topk_blocks(8, k=3) | window(4)") == topk_blocks(8, 3) | window(4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("windw(3)", "no pattern 'windw': did you mean window"),
        ("qqqqqq", "known are .*causal"),
        ("window", r"takes arguments: window\(left, right=None\)"),
        ("causal()", "write causal alone"),
        ("window(3", "is not a pattern"),
        ("", "is not a pattern"),
        ("3", "a pattern is a name, a call"),
        ("window(3) + causal", "joined by &"),
        ("window(3).mask(4)", "a pattern is a name, a call"),
        ("window(*[3])", "a pattern is a name, a call"),
        ("window(**{})", "written out one by one"),
        ("window(size=3)", "unexpected keyword"),
        ("window(-3)", "distances >= 0"),
        ("window(-causal)", "only a number has a sign"),
        ("window('3')", "whole distances"),
        ("sinks(b'3')", "cannot be written"),
        ("per_head(3)", "not iterable"),
        ("__import__('os')", "no pattern '__import__'"),
        ("parse('causal')", "no pattern 'parse'"),
        ("key_padding([1])", "key_padding"),
        ("~" * 5000 + "causal", "nested too deeply|is not a pattern"),
    ],
)
def test_refuses_in_words(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_a_tensor_has_no_text() -> None:
    with pytest.raises(ValueError, match="holds a tensor"):
        parse(str(key_padding(torch.ones(1, 3, dtype=torch.bool))))


def test_takes_only_text() -> None:
    with pytest.raises(TypeError, match="text of a pattern"):
        parse(causal)  # type: ignore[arg-type]
