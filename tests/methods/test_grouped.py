"""Groups of context read apart: the model's own attention under a mask of logarithms, and caches joined by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache

from foveate.counting import count_operations
from foveate.methods.grouped import parallel_context_windows, structured_prompting
from foveate.testing.method import small_llama

LENGTHS, QUERY = (7, 4, 9), 6
CLOSE = 1e-5  # transformers' rotary angles are of single precision
TOTAL, LONGEST = sum(LENGTHS), max(LENGTHS)


def places(lengths: Sequence[int], ends: bool, query: int = QUERY) -> Tensor:
    """Positions of all tokens: of groups that end (or begin) together, and of what follows."""
    longest = max(lengths)
    own = [torch.arange(length) + (longest - length if ends else 0) for length in lengths]
    return torch.cat([*own, torch.arange(longest, longest + query)])[None]


def mask(rescale: float, query: int = QUERY) -> Tensor:
    """What is added to the logits: nothing where seen, the scale's logarithm among what follows."""
    group = [number for number, length in enumerate(LENGTHS) for _ in range(length)] + [-1] * query
    size = len(group)
    added = torch.full((size, size), -torch.inf, dtype=torch.float64)
    for i in range(size):
        for j in range(i + 1):
            if group[i] == -1 and group[j] == -1:
                added[i, j] = math.log(rescale)
            elif group[i] in (-1, group[j]):
                added[i, j] = 0.0
    return added[None, None]


@pytest.mark.paper("Structured Prompting", "definition")
@pytest.mark.paper("Structured Prompting", "works_when")
@pytest.mark.parametrize("ends", [True, False])
@torch.no_grad()
def test_it_is_the_model_under_a_mask_with_shared_positions(ends: bool) -> None:
    """Ending together with the scale: structured prompting; beginning together without: parallel context windows."""
    model: Any = small_llama().double().eval()
    tokens = torch.randint(64, (2, TOTAL + QUERY))
    model.set_attn_implementation("sdpa")
    rescale = len(LENGTHS) if ends else 1.0
    expected = model(tokens, attention_mask=mask(rescale), position_ids=places(LENGTHS, ends)).logits
    method = structured_prompting(LENGTHS) if ends else parallel_context_windows(LENGTHS)
    change = method.install(model)
    assert_close(model(tokens).logits, expected, rtol=CLOSE, atol=CLOSE)
    out = model(tokens[:, :TOTAL], use_cache=True)
    rows = [out.logits]
    for at in range(TOTAL, TOTAL + QUERY):
        out = model(tokens[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits)
    assert_close(torch.cat(rows, 1), expected, rtol=CLOSE, atol=CLOSE)
    change.undo()


@pytest.mark.paper("Structured Prompting", "works_when")
@torch.no_grad()
def test_groups_encoded_apart_make_the_same_cache() -> None:
    """The plain model reads each group alone at its aligned positions; their keys and values, laid end to end."""
    model: Any = small_llama().double().eval()
    tokens = torch.randint(64, (1, TOTAL + QUERY))
    apart, first = [], 0
    for length in LENGTHS:
        at = torch.arange(LONGEST - length, LONGEST)[None]
        apart.append(model(tokens[:, first : first + length], position_ids=at, use_cache=True).past_key_values)
        first += length
    joined = DynamicCache(config=model.config)
    for number in range(2):
        keys, values = (
            torch.cat([getattr(cache.layers[number], name) for cache in apart], 2) for name in ("keys", "values")
        )
        joined.update(keys, values, number)
    model.set_attn_implementation("sdpa")
    added = mask(len(LENGTHS))[:, :, TOTAL:]
    at = torch.arange(LONGEST, LONGEST + QUERY)[None]
    expected = model(tokens[:, TOTAL:], past_key_values=joined, attention_mask=added, position_ids=at).logits
    change = structured_prompting(LENGTHS).install(model)
    out = model(tokens, use_cache=True)
    assert_close(out.logits[:, TOTAL:], expected, rtol=CLOSE, atol=CLOSE)
    for number, layer in enumerate(out.past_key_values.layers):
        assert_close(layer.keys[:, :, :TOTAL], joined.layers[number].keys[:, :, :TOTAL], rtol=CLOSE, atol=CLOSE)
    change.undo()


@pytest.mark.paper("Structured Prompting", "works_when")
@torch.no_grad()
def test_work_on_the_context_is_linear_in_the_groups() -> None:
    model: Any = small_llama().eval()
    pairs = []
    for groups in (2, 4, 8):
        change = structured_prompting([16] * groups).install(model)
        with count_operations() as counted:
            model(torch.randint(64, (1, 16 * groups)))
        pairs.append(counted.pairs)
        change.undo()
    assert pairs[0] * 4 == pairs[1] * 2 == pairs[2] == 2 * 4 * 8 * (16 * 17 // 2)


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_groups_without_tokens_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"lengths of the groups|at least one token each"):
        structured_prompting(lengths)
