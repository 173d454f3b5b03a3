"""Part Attention: the masked dense computation, the order it runs in, and the work that it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.formulas import agree
from tests.support.masked import masked_mixer
from torch import Tensor
from torch.testing import assert_close

from foveate.catalogue.registry import mixer
from foveate.counting import count_operations


def model(**options: Any) -> Any:
    made: Any = mixer("part_attention", 24, heads=4, **options).double()
    return made


def ragged(batch: int = 2, length: int = 47) -> Tensor:
    """Labels in no order, of parts of unequal sizes, other ones in each entry; one has a token of its own."""
    sizes = torch.tensor([0.02, 0.5, 0.08, 0.3, 0.1])
    parts = torch.multinomial(sizes, batch * length, replacement=True).view(batch, length) * 1000
    parts[1] += 7
    parts[:, 13] = 99
    return parts


@pytest.mark.paper("Ultra3D / Part Attention", "definition")
@pytest.mark.paper("Ultra3D / Part Attention", "works_when")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("moved", [0.0, 0.3])
def test_it_is_the_dense_computation_with_other_parts_masked(kv_heads: int, moved: float) -> None:
    part, x = model(kv_heads=kv_heads), torch.randn(2, 47, 24, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(moved * torch.randn_like(parameter))
    parts = ragged()
    seen = (parts[:, :, None] == parts[:, None, :]).unsqueeze(1)
    agree(part(x, parts=parts), masked_mixer(part, x, seen), x, part)


@pytest.mark.paper("Ultra3D / Part Attention", "works_when")
@torch.no_grad()
def test_the_order_and_the_names_of_parts_do_not_matter() -> None:
    part, x, parts = model(), torch.randn(2, 47, 24, dtype=torch.float64), ragged()
    order = torch.randperm(47)
    renamed = (parts.max() - parts)[:, order]
    assert_close(part(x[:, order], parts=renamed), part(x, parts=parts)[:, order])


@pytest.mark.paper("Ultra3D / Part Attention", "works_when")
@torch.no_grad()
def test_only_pairs_of_a_part_are_computed() -> None:
    part, parts = model(), ragged(length=301)
    pairs = 4 * sum(int(size) ** 2 for entry in parts for size in entry.unique(return_counts=True)[1])
    with count_operations() as counted:
        part(torch.randn(2, 301, 24, dtype=torch.float64), parts=parts)
    assert counted.pairs == pairs < 0.6 * 4 * 2 * 301**2


@pytest.mark.paper("Ultra3D / Part Attention", "works_when")
@torch.no_grad()
def test_padding_of_ragged_clouds_changes_nothing() -> None:
    part, x, parts = model(), torch.randn(2, 47, 24, dtype=torch.float64), ragged()
    padding = torch.ones(2, 47, dtype=torch.bool)
    padding[1, 30:] = False
    x[1, 30:] = torch.nan
    out = part(x, parts=parts, padding=padding)
    assert_close(out[1:, :30], part(x[1:, :30], parts=parts[1:, :30]))
    assert_close(out[:1], part(x[:1], parts=parts[:1]))  # the whole cloud beside it
    assert not out[1, 30:].any()


@torch.no_grad()
def test_one_part_is_plain_attention_and_one_label_for_each_entry_is_shared() -> None:
    part, x = model(), torch.randn(2, 47, 24, dtype=torch.float64)
    assert_close(part(x, parts=torch.zeros(2, 47, dtype=torch.int32)), part(x))
    same = ragged()[0]
    assert_close(part(x, parts=same), part(x, parts=same.expand(2, 47)))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (torch.zeros(2, 46, dtype=torch.long), r"whole numbers \(2, 47\)"),
        (torch.zeros(2, 47), "got torch.float32"),
        (torch.full((2, 47), -1), "numbered from 0 on; got -1"),
    ],
)
def test_other_labels_are_refused(parts: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model()(torch.randn(2, 47, 24, dtype=torch.float64), parts=parts)
