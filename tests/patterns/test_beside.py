"""Grids with class, register or text tokens beside them."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from foveate import (
    Beside,
    Grid,
    Pattern,
    attend,
    causal,
    full,
    global_tokens,
    key_padding,
    neighborhood,
    relative_table,
    sinks,
    sta,
    strips,
    window,
    window_partition,
)
from foveate.kernels.cpu.loader import library
from foveate.patterns import Scene, to_block_mask
from foveate.patterns.select.build import build

BEFORE, DIMS, AFTER = 3, (9, 11), 20
PLACE = Beside(Grid(*DIMS), before=BEFORE, after=AFTER)
M = BEFORE + 99 + AFTER


def among_all(pattern: Pattern, others: bool) -> Tensor:
    """The grid's own mask amid pairs that are all visible, or all hidden."""
    mask = torch.full((M, M), others)
    mask[BEFORE : BEFORE + 99, BEFORE : BEFORE + 99] = pattern.mask(99, layout=Grid(*DIMS))[0, 0]
    return mask


ON_GRID = (neighborhood(5), neighborhood((3, 4), clamp=False, stride=2), sta(4, (2, 3)), window_partition(4, shift=1))
MEANT = [
    *((pattern, pattern) for pattern in ON_GRID),
    (strips(2) & neighborhood(5), strips(2) & neighborhood(5)),
    (strips(2) & ~neighborhood(5), strips(2) & ~neighborhood(5)),
    (~(strips(2) | ~sta(4, 2)), ~strips(2) & sta(4, 2)),
]


@pytest.mark.parametrize("others", [True, False])
@pytest.mark.parametrize(("pattern", "among"), MEANT, ids=[str(pattern) for pattern, _ in MEANT])
def test_grid_patterns_hold_among_the_tokens_of_the_grid(pattern: Pattern, among: Pattern, others: bool) -> None:
    layout = Beside(Grid(*DIMS), BEFORE, AFTER, others=others)
    expected = among_all(among, others)
    assert torch.equal(pattern.mask(M, layout=layout)[0, 0], expected)
    scene = Scene(M, M, layout)
    for tile, reorder in product((8, 64), (True, False)):
        selection = build(pattern.resolve(scene), scene, tile=tile, reorder=reorder)
        assert torch.equal(selection.to_dense()[0, 0], expected)
    last = pattern.mask(30, M, layout=layout)[0, 0]
    assert torch.equal(last, expected[M - 30 :])


def test_the_rest_of_the_pattern_rules_the_others() -> None:
    place = torch.arange(M)
    q, k = place.unsqueeze(1), place
    near = among_all(neighborhood(3), True)
    seen = (neighborhood(3) & causal).mask(M, layout=PLACE)[0, 0]
    assert torch.equal(seen, near & (k <= q))
    hidden = Beside(PLACE.grid, BEFORE, AFTER, others=False)
    seen = (neighborhood(3) | global_tokens([0]) | sinks(2) & window(9)).mask(M, layout=hidden)[0, 0]
    joined = (q == 0) | (k == 0) | (k < 2) & (k <= q) & ((q - k).abs() <= 9)
    assert torch.equal(seen, among_all(neighborhood(3), False) | joined)


def test_padding_beside_a_grid_hides_keys_and_nothing_else() -> None:
    keep = torch.ones(2, M, dtype=torch.bool)
    keep[0, :BEFORE] = keep[1, M - 5 :] = False
    for pattern in (neighborhood(5), strips(2) & ~neighborhood(5)):
        expected = pattern.mask(M, layout=PLACE) & keep[:, None, None, :]
        seen = (pattern & key_padding(keep)).mask(M, layout=PLACE)
        rows = keep[:, None, :, None].expand_as(seen)  # what padding itself sees is nobody's matter
        assert torch.equal(seen[rows], expected[rows])


IMPLS = ["reference", "tiles", "sdpa", "native"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pattern", [neighborhood(5), sta(4, (2, 3)) & ~strips(1), sta(2, 3) & causal], ids=str)
def test_attention_forward_and_backward(impl: str, pattern: Pattern) -> None:
    if impl == "native" and library() is None:
        pytest.skip("no native kernels")
    q, k, v = (torch.randn(2, 2, M, 8, requires_grad=True) for _ in range(3))
    mask = pattern.mask(M, layout=PLACE)
    outs = scaled_dot_product_attention(q, k, v, attn_mask=mask), attend(q, k, v, pattern, layout=PLACE, impl=impl)
    grads = [torch.autograd.grad(out, (q, k, v), torch.ones_like(out).cumsum(-1)) for out in outs]
    torch.testing.assert_close(outs[1], outs[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention() -> None:
    q, k, v = torch.randn(3, 1, 2, M, 16)
    for pattern in (neighborhood(5), sta(4, 2) & ~sinks(1)):
        out = flex_attention(q, k, v, block_mask=to_block_mask(pattern, M, layout=PLACE))
        expected = scaled_dot_product_attention(q, k, v, attn_mask=pattern.mask(M, layout=PLACE))
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("layout", [PLACE, Beside(Grid(11, 11), 1, others=False)], ids=str)
def test_compiles(layout: Beside) -> None:
    q = torch.randn(1, 2, M, 8, requires_grad=True)

    def run(q: Tensor) -> Tensor:
        return attend(q, q, q, neighborhood(5), layout=layout, softcap=5.0)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), run(q))


def test_whole_tiles_stay_whole_beside_text() -> None:
    """STA over its own tiles with text behind: full tiles alone, the others in tiles of their own."""
    layout = Beside(Grid(64, 64), after=128)
    q = torch.empty(1).expand(1, 1, layout.length, 1)
    selection = sta(8, 3).select(q, q, layout)
    assert len(selection.masks) == 0
    assert selection.num_tiles == 64 * (9 + 2) + 2 * (64 + 2)


def test_large_grids_share_masks() -> None:
    layout = Beside(Grid(96, 128), before=5, after=77)
    q = torch.empty(1).expand(1, 1, layout.length, 1)
    selection = (neighborhood(7) & causal).select(q, q, layout)
    assert len(selection.masks) < 150


def test_no_token_beside_is_the_grid_itself() -> None:
    q, k, v = torch.randn(3, 1, 2, 99, 8)
    here, there = (attend(q, k, v, neighborhood(5), layout=x) for x in (Grid(*DIMS), Beside(Grid(*DIMS))))
    torch.testing.assert_close(here, there)


def test_draws_what_the_middle_of_the_grid_sees() -> None:
    drawn = neighborhood(3).draw(layout=Beside(Grid(5, 5), before=1, after=2))
    assert [panel.caption for panel in drawn.panels][1:] == ["what (2, 2) sees"]
    assert drawn.panels[1].cells.sum() == 9 and drawn.panels[1].cells[1:4, 1:4].all()


def test_prints_and_compares() -> None:
    assert str(Beside(Grid(2, 3), after=4, others=False)) == "Beside(Grid(2, 3), after=4, others=False)"
    assert Beside(Grid(2, 3), 1) == Beside(Grid(2, 3), before=1) != Beside(Grid(2, 3), after=1)


def test_refuses_in_words() -> None:
    with pytest.raises(TypeError, match="takes a Grid"):
        Beside((3, 4))  # type: ignore[arg-type]
    for wrong in (-1, 2.5, True):
        with pytest.raises(ValueError, match="whole numbers of tokens"):
            Beside(Grid(3, 4), before=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has 122 tokens"):
        full.mask(99, layout=PLACE)
    with pytest.raises(ValueError, match="at most 9"):
        neighborhood(10).mask(M, layout=PLACE)
    q = torch.randn(1, 1, M, 8)
    with pytest.raises(ValueError, match="no entry for the other tokens"):
        attend(q, q, q, neighborhood(3), bias=relative_table(torch.zeros(1, 3, 3), DIMS), layout=PLACE)
