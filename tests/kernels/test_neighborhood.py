"""The native kernels for windows on grids against the definition in float64: values, log row sums and gradients."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.support.attend_inputs import leaf
from tests.support.native_checks import (
    DTYPES,
    LAYOUTS,
    assert_native_agrees,
    cast,
    every_dtype,
    needs_native,
    one_thread,
    outcome,
)
from torch import Tensor

from foveate import Grid, alibi, attend, neighborhood, relative_table, strips, window
from foveate.attention.impl import native
from foveate.attention.impl.neighborhood import Windows, backward, forward, pays, windows_of
from foveate.layouts.kinds import Sequence
from foveate.patterns.algebra import Pattern
from foveate.patterns.select.selection import Selection

Relaid = Callable[[Tensor], Tensor]
pytestmark = [needs_native, pytest.mark.usefixtures(one_thread.__name__)]

HEADS = ((2, 2, 2), (4, 2, 2), (4, 1, 4), (6, 2, 3), (1, 1, 1))  # of queries, keys and values
CASES = [  # grids that no vector divides, windows of even and odd sizes up to the whole grid
    (neighborhood(5), Grid(5)),
    (neighborhood(6), Grid(77)),
    (neighborhood(17, causal=True), Grid(90)),
    (neighborhood(4, dilation=5), Grid(123)),
    (neighborhood(3), Grid(9, 21)),
    (neighborhood((7, 7)), Grid(14, 33)),
    (neighborhood((2, 5)), Grid(7, 5)),
    (neighborhood((11, 13)), Grid(11, 40)),
    (neighborhood((3, 4), dilation=(2, 3)), Grid(13, 31)),
    (neighborhood((5, 3), causal=(True, False)), Grid(12, 19)),
    (neighborhood((3, 9), causal=(False, True)), Grid(8, 35)),
    (neighborhood((4, 3), dilation=(3, 2), causal=True), Grid(16, 37)),
    (neighborhood((3, 2, 5)), Grid(4, 5, 20)),
    (neighborhood((2, 5, 3), causal=(True, False, False)), Grid(6, 7, 9)),
    (neighborhood((3, 2, 3), dilation=(1, 2, 2), causal=(False, False, True)), Grid(3, 6, 18)),
]
SEVERAL_BOXES = [(neighborhood((7, 7)), Grid(56, 17)), (neighborhood(9), Grid(700)), (neighborhood(3), Grid(16, 5, 20))]


@pytest.fixture(autouse=True)
def _whether_or_not_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.attention.impl.native.pays", lambda *_: True)


def inputs(
    layout: Grid, heads: tuple[int, int, int] | None = None, dim: int = 0, value_dim: int = 0, batch: int = 2
) -> dict[str, Any]:
    """Queries, keys and values of any heads and widths, and a scale."""
    chosen = heads or random.choice(HEADS)
    dim, value_dim = dim or random.choice([1, 7, 16, 32, 40]), value_dim or random.choice([3, 16, 32, 33])
    widths = zip("qkv", chosen, (dim, dim, value_dim), strict=True)
    tensors = {name: torch.randn(batch, h, layout.length, d, dtype=torch.float64) for name, h, d in widths}
    return tensors | {"scale": random.choice([0.3, 1.0, -0.5])}


def assert_agrees(
    pattern: Pattern,
    layout: Grid,
    call: dict[str, Any],
    dtype: torch.dtype,
    relaid: Relaid | None = None,
    threads: tuple[int, ...] = (1,),
) -> None:
    assert_native_agrees(call | {"pattern": pattern, "layout": layout}, dtype, relaid, threads=threads)


def windows(pattern: Pattern, layout: Grid) -> Windows:
    found = windows_of(pattern, layout, layout.length)
    assert found is not None
    return found


@pytest.mark.parametrize("pattern, layout", CASES, ids=str)
@every_dtype
def test_agrees_with_the_definition(pattern: Pattern, layout: Grid, dtype: torch.dtype) -> None:
    assert_agrees(pattern, layout, inputs(layout), dtype)


def grid_bias(kind: str, heads: int, layout: Grid) -> Any:
    """A bias of each kind that a neighborhood's own kernel takes."""
    n, two = layout.length, random.choice([1, 2])
    if kind == "relative":
        sides = [2 * random.randint(1, side) + 1 for side in layout.dims]
        return relative_table(leaf(heads, *sides, dtype=torch.float64), layout.dims)
    if kind == "alibi":
        return alibi(leaf(heads, dtype=torch.float64) / n)
    shape = {"dense": (two, heads, n, n), "keys": (two, heads, 1, n), "queries": (n, 1), "shared": (n, n)}[kind]
    return leaf(*shape, dtype=torch.float64)


@pytest.mark.parametrize("pattern, layout", CASES, ids=str)
@pytest.mark.parametrize("kind", ["relative", "dense"])
def test_biases_agree_with_the_definition(pattern: Pattern, layout: Grid, kind: str) -> None:
    call = inputs(layout, random.choice([(4, 2, 2), (2, 2, 1)]))
    bias = grid_bias(kind, call["q"].shape[1], layout)
    assert_agrees(pattern, layout, call | {"bias": bias}, random.choice(DTYPES))


@pytest.mark.parametrize("kind", ["relative", "alibi", "dense", "keys", "queries", "shared"])
@every_dtype
def test_biases_of_every_kind(kind: str, dtype: torch.dtype) -> None:
    layout = Grid(9, 21)
    call = inputs(layout, (4, 2, 2))
    assert_agrees(neighborhood((5, 3), dilation=(1, 2)), layout, call | {"bias": grid_bias(kind, 4, layout)}, dtype)


def test_several_biases_on_several_threads() -> None:
    torch.set_num_threads(2)
    layout = Grid(30, 40)
    call = inputs(layout, (4, 2, 2), dim=32, value_dim=32, batch=1)
    table, slopes = grid_bias("relative", 4, layout), grid_bias("alibi", 4, layout)
    q, k, v = (call[name].float().requires_grad_() for name in "qkv")
    results = []
    for _ in range(3):
        biases = [replace(bias, parameter=bias.parameter.detach().float().requires_grad_()) for bias in (table, slopes)]
        out = attend(q, k, v, neighborhood((7, 5)), layout=layout, bias=biases, impl="native")
        wanted = [q, k, v, *(bias.parameter for bias in biases)]
        results.append([out, *torch.autograd.grad(out, wanted, torch.ones_like(out))])
    assert all(torch.equal(a, b) for others in results[1:] for a, b in zip(results[0], others, strict=True))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    biases = [
        replace(bias, parameter=bias.parameter.detach().float().double().requires_grad_()) for bias in (table, slopes)
    ]
    out = attend(*exact, neighborhood((7, 5)), layout=layout, bias=biases, impl="reference")
    truths = [out, *torch.autograd.grad(out, [*exact, *(bias.parameter for bias in biases)], torch.ones_like(out))]
    for actual, truth in zip(results[0], truths, strict=True):
        actual, truth = actual.detach(), truth.detach()
        assert float((actual.double() - truth).norm()) <= 2e-5 * float(truth.norm()) + 1e-4


def test_a_bias_may_hide_pairs_and_whole_rows() -> None:
    layout = Grid(6, 17)
    bias = torch.where(torch.rand(102, 102) < 0.3, -torch.inf, 0.0).double()
    bias[[5, 70]] = -torch.inf
    call = inputs(layout, (2, 2, 2))
    assert_agrees(neighborhood((3, 5)), layout, call | {"bias": bias.requires_grad_()}, torch.float32)


def test_a_bias_stays_on_the_windows() -> None:
    layout, q = Grid(14, 15), torch.randn(1, 2, 210, 16)
    table = relative_table(torch.zeros(2, 5, 5), layout.dims)
    other = relative_table(torch.zeros(2, 5, 5), (15, 14))
    for bias, kind in ((table, Windows), (alibi(torch.ones(2)), Windows), (other, Selection)):
        selected = native.select(q, q, neighborhood(3), layout, 1.0, plain=True, biases=(bias,))
        assert isinstance(selected, kind)


@pytest.mark.parametrize("dim", [1, 2, 15, 17, 31, 48, 63, 64, 65, 100, 128, 200, 256])
def test_heads_of_any_width(dim: int) -> None:
    layout = Grid(6, 19)
    tensors = inputs(layout, dim=dim, value_dim=random.choice([1, 5, 32, 64, 80, 256]), batch=1)
    assert_agrees(neighborhood((3, 5)), layout, tensors, random.choice(DTYPES))


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_key_and_value_heads_that_queries_share(heads: tuple[int, int, int]) -> None:
    assert_agrees(neighborhood(3), Grid(5, 9), inputs(Grid(5, 9), heads), random.choice(DTYPES))


@pytest.mark.parametrize("relaid", LAYOUTS)
@pytest.mark.parametrize("dims", [(7, 9), (32, 16)], ids=str)
@every_dtype
def test_tensors_of_any_strides(relaid: str, dims: tuple[int, int], dtype: torch.dtype) -> None:
    layout = Grid(6, 20)
    tensors = inputs(layout, (4, 2, 4), *dims)
    assert_agrees(neighborhood((3, 5), dilation=random.choice([1, 2])), layout, tensors, dtype, LAYOUTS[relaid])


@pytest.mark.parametrize("pattern, layout", SEVERAL_BOXES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1, 1), (4, 1, 2)], ids=str)
def test_threads_share_the_boxes_of_a_grid_and_agree(
    pattern: Pattern, layout: Grid, heads: tuple[int, int, int]
) -> None:
    assert_agrees(pattern, layout, inputs(layout, heads, batch=1), random.choice(DTYPES), threads=(1, 2, 3))


@every_dtype
def test_the_same_bits_however_threads_are_scheduled(dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    layout = Grid(40, 30)
    call = cast(inputs(layout, (2, 1, 1), batch=1), dtype) | {"pattern": neighborhood((5, 7)), "layout": layout}
    call |= {"bias": None, "weights": "softmax"}
    seeds = torch.randn(1, 2, layout.length, call["v"].shape[3]), torch.randn(1, 2, layout.length)
    first, *others = (outcome(call, seeds, "native") for _ in range(8))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_tokens_outside_a_window_do_not_reach_its_query() -> None:
    """Not even as NaN times zero: neither values, nor what borders and padding make up for."""
    layout = Grid(9, 20)
    q, k, v = (torch.randn(1, 1, 180, dim) for dim in (8, 8, 5))
    out = [attend(q, k, v, neighborhood((3, 3)), layout=layout, impl="native").view(9, 20, 5)]
    for x in (k, v):
        x.view(9, 20, -1)[4, 10] = torch.nan
    out.append(attend(q, k, v, neighborhood((3, 3)), layout=layout, impl="native").view(9, 20, 5))
    sees = torch.zeros(9, 20, dtype=torch.bool)
    sees[3:6, 9:12] = True
    assert out[1][sees].isnan().all()
    assert torch.equal(out[1][~sees], out[0][~sees])


@pytest.mark.parametrize("size", [1e-4, 3e3])
def test_logits_all_but_equal_and_far_apart(size: float) -> None:
    layout = Grid(7, 18)
    tensors = inputs(layout, dim=8)
    tensors["q"] *= size
    assert_agrees(neighborhood((3, 5)), layout, tensors, torch.float32)


def test_the_gradient_of_log_row_sums_may_be_absent() -> None:
    seen = windows(neighborhood(3), Grid(6, 7))
    q, k, v = (torch.randn(2, 2, 42, 16) for _ in range(3))
    out, lse = forward(seen, q, k, v, 0.3)
    grad_out = torch.randn_like(out)
    without, zero = (
        backward(seen, q, k, v, out, lse, grad_out, grad_lse, 0.3) for grad_lse in (None, torch.zeros_like(lse))
    )
    assert all(torch.equal(a, b) for a, b in zip(without, zero, strict=True))


def test_no_queries_no_work() -> None:
    q = torch.randn(0, 2, 25, 8, requires_grad=True)
    out = attend(q, q, q, neighborhood(3), layout=Grid(5, 5), impl="native")
    assert out.shape == (0, 2, 25, 8)
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_windows_are_told_from_other_patterns() -> None:
    grid = Grid(8, 10)
    seen = windows(neighborhood((3, 5), dilation=2, causal=(True, False)), grid)
    assert seen == Windows((8, 10), (3, 5), (2, 2), (True, False))
    others: list[Pattern] = [
        strips(2),
        window(4),
        neighborhood(3, stride=2),
        neighborhood(3) & window(9),
        ~neighborhood(3),
    ]
    assert all(windows_of(pattern, grid, 80) is None for pattern in others)
    assert windows_of(neighborhood(3), grid, 70) is None
    assert windows_of(neighborhood(3), Sequence(80), 80) is None


def test_attend_takes_windows() -> None:
    layout = Grid(14, 15)
    q = torch.randn(1, 2, layout.length, 16)
    assert isinstance(native.select(q, q, neighborhood(3), layout, 1.0, plain=True), Windows)
    assert isinstance(native.select(q, q, neighborhood(3), layout, 1.0, plain=False), Selection)


def test_windows_pay_where_tiles_would_form_many_more_pairs() -> None:
    narrow, whole = (windows(neighborhood(size), Grid(14, 15)) for size in (3, (14, 15)))
    for dtype in DTYPES:
        assert pays(narrow, dtype, 32)
        assert not pays(whole, dtype, 32)
    assert pays(windows(neighborhood(21), Grid(64, 64)), torch.float32, 32)
