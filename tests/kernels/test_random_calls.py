"""attend's native kernels on anything: shapes, strides, patterns and numbers at the edge of what floats hold."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.patterns.test_patterns import trees
from tests.support.attend_inputs import HEADS, leaf, random_bias, random_weights
from tests.support.native_checks import DTYPES, LAYOUTS, assert_native_agrees, cast, needs_native, one_thread

from foveate import attend
from foveate.patterns import Pattern

pytestmark = [needs_native, pytest.mark.usefixtures(one_thread.__name__)]


class Drawn(NamedTuple):
    """What hypothesis varies, and shrinks."""

    seed: int
    lengths: tuple[int, int]
    dims: tuple[int, int]
    heads: tuple[int, int, int]
    pattern: Pattern
    scale: float | None
    softcap: float | None
    dtype: torch.dtype
    layouts: list[str]

    def call(self) -> dict[str, Any]:
        """Keyword arguments of one `attend` call in float64."""
        random.seed(self.seed)
        torch.manual_seed(self.seed)
        (n, m), (dim, value_dim), (heads, key_heads, value_heads) = self.lengths, self.dims, self.heads
        return {
            "q": leaf(2, heads, n, dim, dtype=torch.float64),
            "k": leaf(2, key_heads, m, dim, dtype=torch.float64),
            "v": leaf(2, value_heads, m, value_dim, dtype=torch.float64),
            "bias": random_bias(heads, n, m, torch.float64),
            "weights": random_weights(heads, torch.float64),
            "pattern": self.pattern,
            "scale": self.scale,
            "softcap": self.softcap,
        }

    def relaid(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Puts one tensor after the other elsewhere in memory."""
        turns = iter(self.layouts)
        return lambda x: LAYOUTS[next(turns)](x)


lengths = st.one_of(st.integers(0, 200), st.sampled_from([1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 192]))
dims = st.one_of(st.integers(1, 40), st.sampled_from([48, 64, 80, 128, 136, 256]))
drawn = st.builds(
    Drawn,
    seed=st.integers(0, 2**32 - 1),
    lengths=st.tuples(lengths, lengths),
    dims=st.tuples(dims, dims),
    heads=st.sampled_from([(1, 1, 1), *HEADS]),
    pattern=trees,
    scale=st.sampled_from([None, 0.3, -0.7, 1e-8]),
    softcap=st.sampled_from([None, None, 1.5, 30.0]),
    dtype=st.sampled_from(DTYPES),
    layouts=st.lists(st.sampled_from(list(LAYOUTS)), min_size=4, max_size=4),
)


def examples(few: int, many: int) -> pytest.MarkDecorator:
    """As many examples, and more of them among the longer sweeps."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.long)])


def fuzz(count: int, check: Callable[..., None], **strategies: st.SearchStrategy) -> None:
    settings(max_examples=count, deadline=None)(given(**strategies)(check))()


@examples(60, 2000)
def test_any_call(count: int) -> None:
    def check(drawn: Drawn) -> None:
        assert_native_agrees(drawn.call(), drawn.dtype, drawn.relaid())

    fuzz(count, check, drawn=drawn)


def with_bias(call: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    shape = (2, call["q"].shape[1], call["q"].shape[2], call["k"].shape[2])
    return call | {"bias": change(torch.randn(shape, dtype=torch.float64)), "weights": "softmax"}


def without_some_rows(bias: torch.Tensor) -> torch.Tensor:
    hidden = (torch.rand(bias.shape) < 0.2) | (torch.rand(*bias.shape[:3], 1) < 0.2)
    return bias.masked_fill(hidden, -torch.inf)


def times(call: dict[str, Any], **factors: float) -> dict[str, Any]:
    return call | {name: call[name].detach() * factor for name, factor in factors.items()}


EXTREMES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "logits of thousands": lambda call: call | {"scale": 1e3},
    "logits of minus thousands": lambda call: call | {"scale": -1e3},
    "some keys far above all others": lambda call: with_bias(call, lambda bias: 1e4 * (bias > 2)),
    "all logits equal": lambda call: times(call, q=0.0) | {"bias": None},
    "all logits zero": lambda call: call | {"scale": 0.0, "bias": None},
    "all logits ten thousand": lambda call: with_bias(times(call, q=0.0), lambda bias: bias * 0 + 1e4),
    "all logits minus ten thousand": lambda call: with_bias(times(call, q=0.0), lambda bias: bias * 0 - 1e4),
    "biases that hide pairs and whole rows": lambda call: with_bias(call, without_some_rows),
    "a tiny scale": lambda call: call | {"scale": 1e-30},
    "a huge scale of tiny numbers": lambda call: times(call, q=1e-4, k=1e-4) | {"scale": 1e8},
    "values of thousands": lambda call: times(call, v=1e3),
    "a soft-cap far below the logits": lambda call: call | {"scale": 100.0, "softcap": 0.5},
}


@examples(60, 1000)
def test_logits_at_the_edge(count: int) -> None:
    def check(drawn: Drawn, extreme: str) -> None:
        assert_native_agrees(EXTREMES[extreme](drawn.call()), drawn.dtype, drawn.relaid())

    small = drawn.map(lambda one: one._replace(dims=(min(one.dims[0], 40), one.dims[1])))
    fuzz(count, check, drawn=small, extreme=st.sampled_from(list(EXTREMES)))


@examples(60, 1000)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_number_that_is_not_finite_stays_with_the_rows_that_see_it(name: str, count: int) -> None:
    def check(drawn: Drawn, number: float, place: tuple[int, int]) -> None:
        clean = cast(drawn.call(), drawn.dtype)
        struck = clean[name].detach().clone()
        if not struck.numel():
            return
        token, channel = place[0] % struck.shape[2], place[1] % struck.shape[3]
        struck[0, :, token, channel] = number
        dirty = clean | {name: struck}
        sees = rows_that_see(drawn, token, in_queries=name == "q")
        was, now, truth = run(clean, "native"), run(dirty, "native"), run(cast(dirty, torch.float64), "reference")
        # A call that meets such a number is summed anew, in another order. Weights may add up to more than 1.
        summed = run(cast(clean | {"v": clean["v"].detach().abs()}, torch.float64), "reference").abs()
        size = max([1.0, *clean["v"].detach().abs().flatten().tolist()])
        close = (now - was).abs() <= 64 * torch.finfo(drawn.dtype).eps * (summed + size)
        assert close[1:].all()
        if name != "v":  # a weight of 0 times such a value is NaN
            assert close[0, :, ~sees].all()
        spoiled = ~now[0, :, sees].isfinite()
        assert not truth[0, :, sees].isfinite()[spoiled].any(), "finite in the definition"

    numbers = st.sampled_from([torch.nan, torch.inf, -torch.inf])
    places = st.tuples(st.integers(0, 999), st.integers(0, 999))
    fuzz(count, check, drawn=drawn, number=numbers, place=places)


def rows_that_see(drawn: Drawn, token: int, in_queries: bool) -> torch.Tensor:
    """Whether each query row (N,) is the one at a token, or sees the key there."""
    if in_queries:
        return torch.arange(drawn.lengths[0]) == token
    return drawn.pattern.mask(*drawn.lengths)[0, 0, :, token]


def run(call: dict[str, Any], impl: str) -> torch.Tensor:
    return attend(**call, impl=impl).detach()
