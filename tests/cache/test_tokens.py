"""Tokens appended in place are values: earlier ones never change, whatever is appended to them later."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.cache import Tokens

B = 3


def pieces(*lengths: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens of two tensors of other heads and channels."""
    return [(torch.randn(B, 2, n, 5), torch.randn(B, 1, n, 7)) for n in lengths]


def whole(parts: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [torch.cat(each, 2) for each in zip(*parts, strict=True)]


def test_tokens_appended_are_there_in_order() -> None:
    for capacity in (None, 0, 1, 7, 64):
        tokens, parts = Tokens(B, capacity), pieces(3, 0, 1, 1, 13, 1, 40, 1)
        for mode in (torch.no_grad(), torch.enable_grad(), torch.inference_mode(), torch.no_grad()):
            with mode:
                for part in parts:
                    tokens = tokens.append(*part)
        assert tokens.length == 4 * 60
        for got, expected in zip(tokens.tensors, whole(parts * 4), strict=True):
            assert_close(got, expected, rtol=0, atol=0)


@torch.no_grad()
def test_every_branch_of_a_tree_keeps_its_own_tokens() -> None:
    branches = [(Tokens(B, capacity=5), pieces(0))]
    for _ in range(60):
        tokens, parts = random.choice(branches)
        if random.random() < 0.2:
            tokens = copy.deepcopy(tokens)
        (more,) = pieces(random.randint(0, 4))
        branches.append((tokens.append(*more), [*parts, more]))
    for tokens, parts in branches[1:]:
        for got, expected in zip(tokens.tensors, whole(parts), strict=True):
            assert_close(got, expected, rtol=0, atol=0)


@torch.no_grad()
def test_tokens_kept_leave_those_they_come_from_alone() -> None:
    tokens = Tokens(B, most=12)
    (first,), (more,), (other,) = pieces(11), pieces(4), pieces(4)
    tokens = tokens.append(*first)
    kept = tokens.keep([(0, 2), (7, 9)])
    after, beside = kept.append(*more), tokens.append(*other)
    for i in range(2):
        assert_close(after.tensors[i], torch.cat([first[i][:, :, :2], first[i][:, :, 7:9], more[i]], 2), rtol=0, atol=0)
        assert_close(beside.tensors[i], torch.cat([first[i], other[i]], 2), rtol=0, atol=0)
    assert kept.keep([]).append(*more).length == 4


@torch.no_grad()
def test_a_token_is_written_once_and_never_moved_where_there_is_room() -> None:
    tokens, (token,) = Tokens(B, capacity=100), pieces(1)
    addresses = set()
    for _ in range(100):
        tokens = tokens.append(*token)
        addresses.add(tokens.tensors[0].data_ptr())
    assert len(addresses) == 1
    assert tokens.nbytes == B * 100 * (2 * 5 + 7) * 4
    grown = Tokens(B)
    addresses = set()
    for _ in range(1000):
        grown = grown.append(*token)
        addresses.add(grown.tensors[0].data_ptr())
    assert len(addresses) <= 8  # room doubles
    assert grown.nbytes <= 2 * 1000 * B * (2 * 5 + 7) * 4


def test_gradients_go_through_what_was_appended() -> None:
    first, second = (torch.randn(B, 2, n, 5, dtype=torch.float64, requires_grad=True) for n in (3, 1))
    tokens = Tokens(B, capacity=10)
    losses = []
    for part in (first, second, second):
        tokens = tokens.append(part)
        losses.append(tokens.tensors[0].square().sum())  # autograd holds what the next append must not write over
    with torch.no_grad():
        tokens.append(second.detach())
    sum(losses).backward()  # type: ignore[union-attr]
    assert_close(first.grad, 3 * 2 * first)
    assert_close(second.grad, 3 * 2 * second)


@torch.no_grad()
def test_numbers_of_another_precision_widen_what_is_kept() -> None:
    low, high = torch.randn(B, 1, 2, 3).bfloat16(), torch.randn(B, 1, 2, 3)
    tokens = Tokens(B).append(low).append(high)
    assert_close(tokens.tensors[0], torch.cat([low.float(), high], 2), rtol=0, atol=0)


@torch.no_grad()
def test_other_sequences_heads_or_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="batch size 3; got tokens of 2"):
        Tokens(B).append(torch.zeros(2, 1, 1, 4))
    tokens = Tokens(B).append(torch.zeros(B, 2, 1, 4))
    for shape in ((1, 2, 1, 4), (B, 1, 1, 4), (B, 2, 1, 1)):
        with pytest.raises(ValueError, match="the state holds"):
            tokens.append(torch.zeros(shape))
    for capacity in (-1, 2.0):
        with pytest.raises(ValueError, match="capacity is a number of tokens"):
            Tokens(B, capacity)  # type: ignore[arg-type]
