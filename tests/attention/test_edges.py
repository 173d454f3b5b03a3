"""At the edge: what is no tensor, sparse ones, nothing at all, constants under another default dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import (
    Grid,
    Packed,
    Points,
    alibi,
    attend,
    blocks,
    causal,
    causal_conv,
    key_padding,
    linear_scan,
    neighborhood,
    prefix,
    recur,
    scan,
    scan_step,
    topk_blocks,
    window,
    within,
)
from foveate.catalogue.registry import rows
from foveate.patterns import Scene, resolve
from foveate.patterns.select.dense import dense_mask
from foveate.recurrence import evolve
from foveate.testing.case import Subject

CALLS: dict[str, tuple[Callable[..., Any], dict[str, tuple[int, ...]]]] = {
    "recur": (recur, {"q": (2, 2, 5, 3), "k": (2, 2, 5, 3), "v": (2, 2, 5, 3), "state": (2, 2, 3, 3)}),
    "scan": (
        scan,
        {"x": (2, 5, 4), "dt": (2, 5, 4), "A": (4, 3), "B": (2, 5, 3), "C": (2, 5, 3), "D": (4,), "state": (2, 4, 3)},
    ),
    "scan_step": (scan_step, {"x": (2, 1, 4), "dt": (2, 1, 4), "A": (4, 3), "B": (2, 1, 3), "C": (2, 1, 3)}),
    "linear_scan": (linear_scan, {"x": (2, 5, 4), "decay": (2, 5, 4), "state": (2, 4)}),
    "causal_conv": (causal_conv, {"x": (2, 5, 4), "weight": (4, 3), "bias": (4,), "tail": (2, 4, 2)}),
    "attend": (attend, {"q": (2, 2, 5, 3), "k": (2, 2, 5, 3), "v": (2, 2, 5, 3), "bias": (2, 5, 5)}),
}
ARGUMENTS = [(name, argument) for name, (_, shapes) in CALLS.items() for argument in shapes]
NEGATIVE = {"A", "decay"}


def arguments(name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    operator, shapes = CALLS[name]
    return operator, {n: -torch.rand(s) if n in NEGATIVE else torch.rand(s) for n, s in shapes.items()}


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
@pytest.mark.parametrize("wrong", ["text", 3, [1.0, 2.0], "sparse"])
def test_what_is_no_dense_tensor_is_refused(name: str, argument: str, wrong: Any) -> None:
    operator, given = arguments(name)
    operator(**given)
    given[argument] = given[argument].to_sparse() if wrong == "sparse" else wrong
    with pytest.raises(TypeError, match=r"must be a|is a dense tensor|bias must be"):
        operator(**given)


@pytest.mark.parametrize("impl", ["reference", "tiles", "auto"])
@pytest.mark.parametrize(("slopes", "dtype", "error"), [("float32", "float64", 1e-12), ("bfloat16", "float32", 1e-4)])
def test_alibi_counts_distances_exactly(impl: str, slopes: str, dtype: str, error: float) -> None:
    q, k, v = torch.randn(3, 1, 2, 700, 4, dtype=getattr(torch, dtype)).unbind(0)
    slope = torch.tensor([0.01, -0.003]).to(getattr(torch, slopes))
    place = torch.arange(700, dtype=torch.float64)
    bias = -slope.double().view(2, 1, 1) * (place[:, None] - place).abs()
    exact = torch.softmax(q.double() @ k.double().mT / 2 + bias, -1) @ v.double()
    assert (attend(q, k, v, bias=alibi(slope), impl=impl) - exact).abs().max() < error


@pytest.mark.parametrize("tile", [8, 24, 40, 64])
def test_tiles_of_any_multiple_of_8_on_grids(tile: int) -> None:
    grid = Grid(7, 9)
    q = k = torch.randn(1, 2, grid.length, 4)
    for pattern in (neighborhood(3), topk_blocks(4, k=2) | neighborhood((3, 5))):
        scene = Scene(grid.length, grid.length, grid, q, k)
        expected = dense_mask(resolve(pattern, scene), scene)
        assert torch.equal(pattern.select(q, k, grid, tile=tile).to_dense(), expected)


@pytest.mark.parametrize("lengths", [None, [0, 0]])
def test_no_tokens_are_differentiable(lengths: list[int] | None) -> None:
    q, k, v = torch.randn(3, 1, 2, 0, 4).requires_grad_().unbind(0)
    out = recur(q, k, v, decay=-torch.rand(2), lengths=lengths).out
    assert out.shape == (1, 2, 0, 4)
    out.sum().backward()


def test_no_sequences_evolve() -> None:
    transition = torch.complex(-torch.rand(3, 2), torch.randn(3, 2))
    ones = torch.ones_like(transition)
    for length in (1, 20):
        out, state = evolve(torch.randn(0, length, 3), transition, ones, ones)
        assert out.shape == (0, length, 3) and state is not None and state.shape == (0, 3, 2)


@pytest.mark.parametrize("name", [row.name for row in rows()])
def test_mixers_of_no_sequences_and_under_other_defaults(name: str) -> None:
    found = next(row for row in rows() if row.name == name)
    subject = Subject(found, getattr(found.mixer, "tiny", {}), "causal" in found.supports)
    mixer, place = subject.mixer(torch.float32), subject.places(19)[0]
    x: Tensor = subject.tokens(place.length).float()
    with torch.no_grad():
        assert mixer(x[:0], layout=place.layout).shape == x[:0].shape
        usual = mixer(x, layout=place.layout)
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            try:
                other = mixer(x, layout=place.layout)
            finally:
                torch.set_default_dtype(torch.float32)
            assert other.dtype == x.dtype
            assert torch.allclose(other, usual, rtol=1e-5, atol=1e-6), dtype


def test_views_that_negate_are_served_on_points() -> None:
    q, k, v = torch.randn(3, 1, 2, 20, 4).unbind(0)
    coords = torch.rand(20, 2)
    bias = torch.randn(20, 20)
    usual = attend(q, k, v, within(0.4), layout=Points(coords), bias=bias)
    turned = [torch.complex(torch.zeros_like(x), -x).conj().imag for x in (q, k, v)]
    assert all(x.is_neg() for x in turned)
    assert torch.allclose(attend(*turned, within(0.4), layout=Points(coords), bias=bias), usual, atol=1e-6)


@pytest.mark.parametrize(
    "coords", [[[0.0, 1.0]], None, torch.full((3, 2), float("nan")), torch.tensor([[0, torch.inf]])]
)
def test_points_that_are_nowhere_are_refused(coords: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="Points takes"):
        Points(coords)


def test_padding_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="key_padding takes a boolean tensor"):
        key_padding([[True]])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [row.name for row in rows() if "padding" in row.supports])
def test_what_stands_in_padding_changes_nothing(name: str) -> None:
    found = next(row for row in rows() if row.name == name)
    subject = Subject(found, getattr(found.mixer, "tiny", {}), "causal" in found.supports)
    mixer, place = subject.mixer(), subject.places(19)[0]
    x, real = subject.tokens(place.length), torch.rand(2, place.length) < 0.7
    real[1, : place.length // 2] = True
    with torch.no_grad():
        clean = mixer(x.masked_fill(~real.unsqueeze(-1), 0), layout=place.layout, padding=real)
        for bad in (float("nan"), float("inf")):
            dirty = mixer(x.masked_fill(~real.unsqueeze(-1), bad), layout=place.layout, padding=real)
            assert torch.equal(dirty, clean)
            assert (dirty[~real] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_infinite_logits_give_nan_in_the_rows_that_see_them(dtype: torch.dtype, bad: float) -> None:
    for length in (3, 9):
        q, k, v = torch.randn(3, 1, 2, length, 4, dtype=dtype).unbind(0)
        q[0, 0, 2, 1] = bad
        k[0, 0, :, 1] = 1
        out = attend(q, k, v)
        assert out[0, 0, 2].isnan().all()
        assert out[0, 1].isfinite().all() and out[0, 0, :2].isfinite().all() and out[0, 0, 3:].isfinite().all()


def test_packs_of_nothing_show_nothing() -> None:
    q, k = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 0, 4)
    for pattern in (blocks(31), window(3) & causal | prefix(1), topk_blocks(3, k=2)):
        assert pattern.select(q, k, Packed([0, 0])).to_dense().shape[2:] == (3, 0)
        assert attend(q, k, k, pattern, layout=Packed([0, 0])).count_nonzero() == 0
    assert blocks(31).mask(3, 0, layout=Packed([0])).shape == (1, 1, 3, 0)
