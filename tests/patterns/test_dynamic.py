"""Patterns that choose from q and k equal definitions in plain loops, and promise only what they keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.dynamic_examples import (
    ACROSS,
    AHEAD,
    CAREFUL,
    PATTERNS,
    SHAPES,
    Shape,
    defined,
    draw,
    every_pattern,
    every_shape,
    first_best,
    mask_of,
    scene_of,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.patterns import (
    Pattern,
    Scene,
    boolean_mask,
    causal,
    full,
    key_padding,
    mass_blocks,
    parse,
    per_head,
    sinks,
    topk_blocks,
    topk_keys,
    vertical_slash,
    window,
)
from foveate.patterns.algebra import Boxes, Interval
from foveate.patterns.rules import choose
from foveate.patterns.rules.decided import block_table, pack_rows
from foveate.patterns.select.build import build
from foveate.patterns.select.dense import dense_mask

# ---- what is chosen ----------------------------------------------------------------------------------------


@every_pattern
@every_shape
def test_equals_its_definition(pattern: Pattern, shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "SCORES", 1)  # 64 queries at a time
    q, k = draw(shape)
    torch.testing.assert_close(mask_of(pattern, q, k), defined(pattern, q, k))


@every_shape
@pytest.mark.parametrize("per", ["query", "block"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_full_budget_is_everything(shape: Shape, per: str, shared: bool) -> None:
    q, k = draw(shape)
    blocks: Any = {"per": per, "shared": shared}
    for pattern in (
        topk_blocks(8, k=50, **blocks),
        mass_blocks(7, 1, **blocks),
        vertical_slash(200, 1),
        topk_keys(200),
    ):
        seen = mask_of(pattern, q, k)
        assert torch.equal(seen, mask_of(causal, q, k).expand_as(seen)), pattern
    blocks["causal"] = False
    for pattern in (
        topk_blocks(8, k=50, **blocks),
        mass_blocks(7, 1.0, **blocks),
        topk_keys(200, causal=False),
    ):
        assert mask_of(pattern, q, k).all(), pattern
    seen = mask_of(vertical_slash(1, 200), q, k)
    assert torch.equal(seen, mask_of(causal, q, k).expand_as(seen))


def test_equal_scores_go_to_the_first() -> None:
    q, k = torch.ones(1, 1, 40, 4), torch.ones(1, 1, 40, 4)
    assert mask_of(topk_blocks(4, k=3), q, k)[0, 0, 39].nonzero().flatten().tolist() == [
        *range(8),
        *range(36, 40),
    ]
    assert mask_of(topk_keys(3), q, k)[0, 0, 39].nonzero().flatten().tolist() == [0, 1, 2]
    k[:, :, 20:24] = 2
    assert mask_of(topk_blocks(4, k=3), q, k)[0, 0, 39, ::4].nonzero().flatten().tolist() == [0, 5, 9]
    assert mask_of(mass_blocks(4, 0.7), q, k)[0, 0, 39, ::4].nonzero().flatten().tolist() == [
        0,
        1,
        2,
        3,
        5,
        9,
    ]


@pytest.mark.parametrize("columns", [1, 33, 70])
@pytest.mark.parametrize("mass", [0.02, 0.5, 0.97])
def test_the_fewest_shares_are_found_early_or_late(columns: int, mass: float) -> None:
    """Rows from peaked to flat, of few distinct values, so that some need a full sort and some do not."""
    peak = torch.linspace(0, 6, 40, dtype=torch.float64).unsqueeze(1)
    share = torch.softmax(peak * torch.randint(4, (40, columns)), -1)
    for row, chosen in zip(share.tolist(), choose.fewest(share, mass).tolist(), strict=True):
        order = first_best(dict(enumerate(row)), columns)
        enough = next(n for n in range(1, columns + 1) if n == columns or sum(row[j] for j in order[:n]) >= mass)
        assert {j for j, keep in enumerate(chosen) if keep} == set(order[:enough])


def test_groups_that_share_have_one_choice_for_each_key_head() -> None:
    q, k = draw(Shape(2, 6, 3, 37, 37))
    for make in (topk_blocks, mass_blocks):
        assert make(8, 1, shared=True).select(q, k, tile=8).heads == 3
        assert make(8, 1).select(q, k, tile=8).heads == 6


@every_pattern
def test_low_precision_and_gradients_do_not_disturb_the_choice(pattern: Pattern) -> None:
    q, k = (x.bfloat16() for x in draw(SHAPES[0]))
    wide = mask_of(pattern, q.float(), k.float())
    assert torch.equal(mask_of(pattern, q.requires_grad_(), k.requires_grad_()), wide)


# ---- what kernels run --------------------------------------------------------------------------------------

JOINED = (
    topk_blocks(8, k=2) | window(5) & causal,
    topk_blocks(16, k=2, per="block") & ~window(3) | sinks(2),
    ~mass_blocks(8, 0.5),
    vertical_slash(2, 3) | topk_keys(4),
    per_head([topk_keys(3), window(9) & causal, full, vertical_slash(2, 2)]),
    topk_blocks(8, k=2, shared=True) & key_padding(torch.arange(37) < torch.tensor([[30], [7]])),
)


@pytest.mark.parametrize("pattern", PATTERNS + JOINED, ids=str)
@pytest.mark.parametrize("tile", [8, 16, 64])
def test_the_selection_is_the_mask(pattern: Pattern, tile: int) -> None:
    shapes = SHAPES[:1] if pattern in JOINED else (*SHAPES, *ACROSS, Shape(1, 1, 1, 200, 300))
    for shape in shapes:
        q, k = draw(shape)
        resolved, scene = pattern.resolve(scene_of(q, k)), scene_of(q, k)
        selection = build(resolved, scene, tile=tile)
        assert torch.equal(selection.to_dense(), dense_mask(resolved, scene)), shape


@every_pattern
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_empty_calls(pattern: Pattern, shape: tuple[int, int]) -> None:
    q, k = draw(Shape(1, 2, 1, *shape))
    selection = pattern.select(q, k, tile=8)
    assert selection.to_dense().shape[2:] == shape
    assert selection.to_dense().all()


def random_boxes(scene: Scene, resolved: Pattern, count: int) -> tuple[Boxes, Tensor]:
    """Boxes and the pairs (T, N, M) each one holds."""
    spans, members = [], []
    for length, start in ((scene.num_queries, scene.offset), (scene.num_keys, 0)):
        low, high = torch.randint(0, length, (2, count)).sort(0).values
        high = torch.where(torch.rand(count) < 0.5, high, (low + 7).clamp_max(length - 1))
        at = torch.arange(length)
        members.append((low[:, None] <= at) & (at <= high[:, None]))
        spans += [low + start, high + start]
    batch, head = torch.randint(resolved.batches, (count,)), torch.randint(resolved.heads, (count,))
    return Boxes(batch, head, Interval(*spans)), members[0][:, :, None] & members[1][:, None, :]


@every_pattern
@every_shape
def test_bounds_never_promise_too_much(pattern: Pattern, shape: Shape) -> None:
    scene = scene_of(*draw(shape))
    resolved = pattern.resolve(scene)
    boxes, member = random_boxes(scene, resolved, 300)
    seen = dense_mask(resolved, scene)[boxes.batch, boxes.head]
    some, every = resolved.bounds(boxes)
    assert (some | ~(seen & member).flatten(1).any(1)).all()
    assert (~every | (seen | ~member).flatten(1).all(1)).all()


@pytest.mark.parametrize("block", [8, 16, 24, 64])
@pytest.mark.parametrize("per_query", [True, False])
def test_bounds_of_tiles_in_a_block_table_are_exact(block: int, per_query: bool) -> None:
    """A table settles every tile that lies in one block, so no mask is evaluated for it."""
    q_block, side = (1, 64) if per_query else (block, block)
    chosen = torch.rand(1, 2, 192 // q_block, -(-200 // block)) < torch.tensor([0.05, 0.9]).view(2, 1, 1)
    words = pack_rows(chosen, q_block)
    table = block_table(words, chosen.shape[2], q_block=q_block, k_block=block, q_start=8)
    scene = Scene(192, 200)
    seen = dense_mask(table, scene)
    for head in range(2):
        for q in range(0, 192, side):
            for k in range(0, 200, block):
                part = seen[0, head, q : q + side, k : k + block]
                ends = (q + 8, min(q + side, 192) + 7, k, min(k + block, 200) - 1)
                boxes = Boxes(torch.tensor([0]), torch.tensor([head]), Interval(*(torch.tensor([e]) for e in ends)))
                some, every = table.bounds(boxes)
                assert (bool(some), bool(every)) == (bool(part.any()), bool(part.all()))


@every_pattern
def test_equal_signatures_mean_equal_masks(pattern: Pattern) -> None:
    scene = scene_of(*draw(Shape(1, 2, 1, 120, 130)))
    resolved = pattern.resolve(scene)
    seen = dense_mask(resolved, scene)
    corners = torch.cartesian_prod(torch.arange(resolved.heads), torch.arange(112), torch.arange(122))
    corners = corners[torch.randperm(len(corners))[:6000]]
    head, q, k = corners.unbind(1)
    first = q + scene.offset
    boxes = Boxes(torch.zeros_like(head), head, Interval(first, first + 7, k, k + 7))
    tiles = seen[0].unfold(1, 8, 1).unfold(2, 8, 1)[head, q, k].flatten(1)
    _, number = torch.unique(resolved.signature(boxes), return_inverse=True)
    representative = torch.zeros(int(number.max()) + 1, dtype=torch.long).scatter(0, number, torch.arange(6000))
    assert torch.equal(tiles[representative[number]], tiles)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            self.numel = max(self.numel, made.numel() if isinstance(made, Tensor) else 0)
        return out


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p.chooses_ahead or p != topk_keys(3)], ids=str)
def test_choosing_never_holds_all_pairs(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "SCORES", 2**12)
    q, k = draw(Shape(1, 1, 1, 1024, 1024), dim=4)
    with Largest() as largest:
        pattern.resolve(scene_of(q, k))
    assert 0 < largest.numel <= 1024 * 1024 // 3


# ---- what is promised --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", CAREFUL, ids=str)
def test_later_tokens_change_no_earlier_row(pattern: Pattern) -> None:
    q, k = draw(Shape(1, 4, 2, 43, 43))
    whole = mask_of(pattern, q, k)
    for t in (1, 7, 8, 9, 20, 42):
        later_q, later_k = q.clone(), k.clone()
        later_q[:, :, t:], later_k[:, :, t:] = -9 * later_q[:, :, t:], 50 * later_k[:, :, t:]
        assert torch.equal(mask_of(pattern, later_q, later_k)[:, :, :t], whole[:, :, :t]), t


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("pattern", AHEAD, ids=str)
def test_what_chooses_ahead_says_so_with_reason(pattern: Pattern, joined: bool) -> None:
    q, k = draw(Shape(1, 4, 2, 43, 43))
    pattern = pattern & causal if joined else pattern
    before = mask_of(pattern, q, k)

    def earlier_rows_change(t: int) -> bool:
        later_q, later_k = q.clone(), k.clone()
        later_q[:, :, t:], later_k[:, :, t:] = -9 * later_q[:, :, t:], -9 * later_k[:, :, t:]
        return not torch.equal(mask_of(pattern, later_q, later_k)[:, :, :t], before[:, :, :t])

    assert any(earlier_rows_change(t) for t in range(1, 43)) is pattern.chooses_ahead


@pytest.mark.parametrize("pattern", CAREFUL, ids=str)
def test_decoding_and_chunks_choose_as_the_whole(pattern: Pattern) -> None:
    q, k = draw(Shape(2, 4, 2, 45, 45))
    whole = mask_of(pattern, q, k)
    for first, end in [(t, t + 1) for t in range(0, 45, 4)] + [(0, 10), (10, 33), (33, 45)]:
        part = mask_of(pattern, q[:, :, first:end], k[:, :, :end])
        assert torch.equal(part, whole[:, :, first:end, :end]), (first, end)


def test_who_is_causal() -> None:
    assert {str(p) for p in CAREFUL} == {
        "topk_blocks(8, k=2)",
        "topk_blocks(5, k=3, shared=True)",
        "topk_blocks(64, k=1)",
        "mass_blocks(4, 0.5)",
        "mass_blocks(8, 0.7, shared=True)",
        "topk_keys(3)",
    }
    assert set(CAREFUL) | set(AHEAD) == set(PATTERNS)
    assert (topk_blocks(8, k=2, causal=False) & causal).is_causal
    assert not (topk_blocks(8, k=2, per="block", causal=False) & causal).is_causal  # later queries choose, too
    assert not (topk_blocks(8, k=2, causal=False) & causal | topk_keys(1, causal=False)).is_causal
    assert (topk_blocks(64, k=8) | window(256) & causal).is_causal


@pytest.mark.parametrize("limit", [causal, window(5, 0), key_padding(torch.ones(1, 23, dtype=torch.bool)) & causal])
def test_what_looks_both_ways_chooses_among_earlier_keys_beside_what_hides_later_ones(limit: Pattern) -> None:
    q, k = torch.randn(1, 2, 23, 8), torch.randn(1, 2, 23, 8)
    distance = torch.arange(23).unsqueeze(1) - torch.arange(23)
    allowed = (distance >= 0) & (distance <= (5 if limit == window(5, 0) else 23))
    best = (q @ k.mT).masked_fill(~allowed, float("-inf")).argsort(-1, descending=True).argsort(-1) < 3
    for pattern in (topk_keys(3, causal=False) & limit, limit & (topk_keys(3, causal=False) | ~full)):
        assert torch.equal(mask_of(pattern, q, k), best & allowed)


@pytest.mark.parametrize("padded", [False, True])
def test_heads_that_choose_together_join_heads_that_choose_alone(padded: bool) -> None:
    q, k = draw(Shape(2, 4, 2, 41, 41))
    limit = key_padding(torch.arange(41).expand(2, -1) >= torch.tensor([[0], [6]])) if padded else full
    together, alone = topk_blocks(5, k=2, shared=True) & limit, topk_keys(3) & limit
    each = per_head([window(1), causal, sinks(2), window(2, 0)]) & limit
    of_group, of_head, given = (mask_of(x, q, k).expand(2, -1, -1, -1) for x in (together, alone, each))
    of_group = of_group.repeat_interleave(2, 1)
    assert torch.equal(mask_of((topk_blocks(5, k=2, shared=True) | topk_keys(3)) & limit, q, k), of_group | of_head)
    assert torch.equal(mask_of(topk_blocks(5, k=2, shared=True) & each, q, k), of_group & given)
    assert torch.equal(mask_of(per_head([full, ~full]) & together, q, k)[:, 1::2].sum(), torch.tensor(0))


def test_head_counts_that_do_not_divide_one_another() -> None:
    q, k = draw(Shape(1, 6, 3, 20, 20))
    together, table = topk_blocks(5, k=2, shared=True), torch.rand(1, 2, 20, 20) > 0.5
    by_three = mask_of(together, q, k).repeat_interleave(2, 1)
    assert torch.equal(mask_of(together & boolean_mask(table), q, k), by_three & table.repeat_interleave(3, 1))
    with pytest.raises(ValueError, match="tells apart 2 heads, and what it is joined with 6"):
        mask_of(together & key_padding(torch.rand(1, 2, 20) > 0.5), q, k)


@every_pattern
def test_prints_as_written(pattern: Pattern) -> None:
    assert parse(str(pattern)) == pattern
    assert pattern.is_dynamic


@every_pattern
def test_needs_q_and_k(pattern: Pattern) -> None:
    with pytest.raises(ValueError, match="chooses from q and k"):
        pattern.resolve(Scene(8, 8))
    with pytest.raises(ValueError, match=r"takes q \(B, H, N, D\) and k"):
        pattern.select(torch.ones(1, 3, 8, 4), torch.ones(1, 2, 8, 4))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("topk_blocks(0, k=1)", "block of at least 1; got 0"),
        ("topk_blocks(8, k=0)", "k of at least 1; got 0"),
        ("topk_blocks(8, k=2.5)", "k of at least 1; got 2.5"),
        ("topk_blocks(8, k=2, per='head')", 'per="query" or per="block"; got \'head\''),
        ("mass_blocks(8, 0.0)", "mass above 0 and at most 1; got 0.0"),
        ("mass_blocks(8, 1.1)", "mass above 0 and at most 1; got 1.1"),
        ("mass_blocks(8, True)", "mass above 0 and at most 1; got True"),
        ("mass_blocks(-1, 0.5)", "block of at least 1; got -1"),
        ("vertical_slash(0, 1)", "vertical of at least 1; got 0"),
        ("vertical_slash(1, 0)", "slash of at least 1; got 0"),
        ("vertical_slash(1, 1, last=0)", "last of at least 1; got 0"),
        ("topk_keys(0)", "count of at least 1; got 0"),
    ],
)
def test_refuses_in_words(text: str, words: str) -> None:
    with pytest.raises(ValueError) as refusal:
        parse(text)
    assert words in str(refusal.value)
