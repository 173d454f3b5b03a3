"""Lengths become whole numbers where they come in, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foveate import Packed, attend, causal, causal_conv, documents, global_tokens, linear_scan, recur, scan
from foveate.recurrence.ssm import evolve

RATES = -torch.ones(2, 3)
TAKERS: dict[str, Callable[[Any, int], Tensor]] = {
    "Packed": lambda n, t: attend(*tokens(t), causal, layout=Packed(n)),
    "documents": lambda n, t: attend(*tokens(t), documents(n) & causal),
    "recur": lambda n, t: recur(*tokens(t), lengths=n).out,
    "scan": lambda n, t: scan(*flat(t, 2, 2), RATES, *flat(t, 3, 3), lengths=n, softplus=True).out,
    "linear_scan": lambda n, t: linear_scan(*flat(t, 2), torch.zeros(1, t, 2), lengths=n).out,
    "causal_conv": lambda n, t: causal_conv(*flat(t, 2), torch.ones(2, 3), lengths=n).out,
    "evolve": lambda n, t: evolve(*flat(t, 2), RATES + 0j, RATES + 0j, RATES + 0j, lengths=n).out,
}


def tokens(length: int) -> list[Tensor]:
    return [x.view(1, 1, length, 2) for x in flat(length, 2, 2, 2)]


def flat(length: int, *widths: int) -> list[Tensor]:
    return [torch.linspace(-1, 1, length * w).cos().view(1, length, w) for w in widths]


@pytest.mark.parametrize("name", TAKERS)
def test_whole_numbers_of_every_kind_mean_the_same(name: str) -> None:
    take, lengths = TAKERS[name], [250, 0, 16]  # more than 255 in all
    want = take(lengths, 266)
    kinds: list[Any] = [tuple(lengths), torch.tensor(lengths), torch.tensor(lengths, dtype=torch.uint8)]
    kinds += [np.array(lengths, dtype=np.uint8), list(np.array(lengths, dtype=np.uint8)), list(torch.tensor(lengths))]
    for given in kinds:
        torch.testing.assert_close(take(given, 266), want)


@pytest.mark.parametrize("name", TAKERS)
def test_what_is_no_length_is_refused_in_words(name: str) -> None:
    refused: list[Any] = [[5.0, 5.0], torch.tensor([5.0, 5.0]), np.array([5.0, 5.0]), [True, 9], "55", 10, [5, "5"]]
    refused += [[None, 10], torch.tensor([True, True]), [np.bool_(True), 9], [5, 2.5 + 2.5]]
    for given in refused:
        with pytest.raises(TypeError, match="whole numbers"):
            TAKERS[name](given, 10)
    with pytest.raises(ValueError, match="0 or more"):
        TAKERS[name]([-1, 11], 10)
    if name != "documents":  # a pattern, which knows of no tokens yet
        with pytest.raises(ValueError, match=r"9|sum|add up"):
            TAKERS[name]([4, 5], 10)


def test_positions_are_not_rounded() -> None:
    with pytest.raises(TypeError, match="whole numbers"):
        global_tokens([1.5])
    assert global_tokens(torch.tensor([3, 1])) == global_tokens([1, 3])
