"""Selections: what kernels run is what the pattern says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.patterns.test_patterns import trees
from tests.support.pattern_examples import CASES, Case

from foveate.layouts.graph import Graph
from foveate.mixers.exact_io.grid_windows import SameLabel
from foveate.patterns import Grid, Pattern, Points, Scene, Selection, Sequence, causal, documents, full, sinks, window
from foveate.patterns.select.build import build
from foveate.patterns.select.dense import dense_mask
from foveate.patterns.select.selection import FULL, pack_bits, unpack_bits


def selection_of(case: Case, tile: int, *, reorder: bool = True) -> Selection:
    return build(case.resolved, case.scene, tile=tile, reorder=reorder)


def check(case: Case, tile: int, *, reorder: bool = True) -> None:
    """It stands for the dense mask, counts it right, and keeps its own promises."""
    selection, mask = selection_of(case, tile, reorder=reorder), dense_mask(case.resolved, case.scene)
    assert torch.equal(selection.to_dense(), mask)
    assert selection.pairs == int(mask.sum())
    assert selection.density <= selection.computed or selection.pairs == 0
    check_lists(selection)


def check_lists(selection: Selection) -> None:
    assert selection.tile_starts[-1] == selection.num_tiles
    assert selection.column_starts[-1] == selection.num_columns
    is_full = (selection.mask_ids == FULL).long()
    tiles = (2 * selection.tile_rows + is_full) * selection.num_k_tiles + selection.tile_ids
    assert (tiles.diff() > 0).all(), "in each row masked tiles first, then full ones, each ascending"
    columns = selection.column_rows * selection.num_k_tiles * selection.tile + selection.column_ids
    assert (columns.diff() > 0).all(), "ascending in each row"
    masked = selection.mask_ids[selection.mask_ids != FULL]
    assert masked.unique().numel() == len(selection.masks), "no mask that no tile uses"
    assert torch.unique(selection.masks.flatten(1), dim=0).shape[0] == len(selection.masks)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("tile", [8, 16, 64])
def test_selection_is_the_dense_mask(case: Case, tile: int) -> None:
    check(case, tile)


@pytest.mark.parametrize("case", [case for case in CASES if case.pattern.needs_axes], ids=repr)
def test_natural_order_is_the_dense_mask_too(case: Case) -> None:
    assert selection_of(case, 8, reorder=False).q_slots is None
    check(case, 8, reorder=False)


@settings(max_examples=80, deadline=None)
@given(trees, st.integers(0, 90), st.integers(0, 90), st.sampled_from([8, 16]))
def test_any_tree_of_any_size(pattern: Pattern, n: int, m: int, tile: int) -> None:
    check(Case(pattern, n, m, Sequence()), tile)


@pytest.mark.parametrize(("n", "m"), [(700, 700), (3, 900), (650, 1300), (900, 130)])
def test_several_levels_of_groups(n: int, m: int) -> None:
    for pattern in (window(40) & causal | sinks(3), documents([300, 500, 100]) & causal, ~window(200)):
        check(Case(pattern, n, m, Sequence()), 8)


def test_bits_survive_packing() -> None:
    bits = torch.rand(5, 3, 24) < 0.5
    assert torch.equal(unpack_bits(pack_bits(bits)), bits)
    assert pack_bits(torch.tensor([True] + [False] * 8 + [True] * 7)).tolist() == [1, 254]


def test_static_selections_are_cached_and_others_are_not() -> None:
    q = torch.zeros(1, 2, 100, 4)
    assert (window(9) & causal).select(q, q) is (window(9) & causal).select(q, q)
    assert window(9).select(q, q) is not window(9).select(q, q, tile=32)
    grid = Grid(10, 10)
    assert window(9).select(q, q, grid) is not window(9).select(q, q)


def test_a_million_tokens_take_little_memory() -> None:
    """About nine tiles of 64 keys a row, three distinct masks at most: a few megabytes, and no N x N."""
    length = 1_000_000
    selection = build(window(512) & causal, Scene(length, length))
    tensors = [value for value in vars(selection).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) < 4e6
    assert selection.num_tiles == sum(min(row, 8) + 1 for row in range(length // 64))
    assert len(selection.masks) <= 3
    assert selection.pairs == 513 * length - 512 * 513 // 2


def test_sparse_tiles_become_columns() -> None:
    selection = build(sinks(2) | causal & window(3), Scene(640, 640))
    assert selection.num_columns >= 2 * 9 and selection.num_tiles == 10
    assert build(full, Scene(640, 640)).num_columns == 0


@pytest.mark.parametrize("tile", [0, 4, 20, -8])
def test_refuses_a_tile_that_is_no_multiple_of_eight(tile: int) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        build(full, Scene(8, 8), tile=tile)


def test_selections_of_held_tensors_are_built_once_and_again_when_these_change() -> None:
    q = torch.randn(2, 2, 70, 8)
    labels = torch.randint(2, (2, 70))
    pattern = SameLabel(labels)
    first = pattern.select(q, q)
    assert pattern.select(q, q) is first
    assert SameLabel(labels).select(q, q) is first
    labels[0, 3] += 1
    assert torch.equal(pattern.select(q, q).to_dense(), labels[:, None, :, None] == labels[:, None, None, :])
    with torch.inference_mode():
        labels = torch.randint(2, (2, 70))
        pattern = SameLabel(labels)
        pattern.select(q, q)
        labels[0, 3] ^= 1
        assert torch.equal(pattern.select(q, q).to_dense(), labels[:, None, :, None] == labels[:, None, None, :])


def test_layouts_that_hold_tensors_equal_only_themselves() -> None:
    coords, edges = torch.rand(5, 2), torch.tensor([[0, 1], [1, 2]])
    for one, other in ((Points(coords), Points(coords.flip(0))), (Graph(edges, 3), Graph(edges.flip(0), 3))):
        assert one == one and one != other and len({one, other}) == 2
    assert Grid(3, 5) == Grid(3, 5) != Grid(5, 3) and len({Sequence(4), Sequence(4), Sequence(5)}) == 2
