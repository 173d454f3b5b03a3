"""attend's native kernels against the definition in float64: values, log row sums and every gradient."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import pytest
import torch
from tests.attention.test_attend import PATTERNS
from tests.support.attend_inputs import HEADS, LENGTHS, leaf, random_call
from tests.support.dynamic_examples import PATTERNS as DYNAMIC
from tests.support.native_checks import (
    DTYPES,
    EPS,
    LAYOUTS,
    assert_native_agrees,
    cast,
    every_dtype,
    needs_native,
    one_thread,
    outcome,
)
from tests.support.pattern_examples import ON_GRIDS, ON_POINTS

from foveate import (
    Grid,
    Packed,
    alibi,
    attend,
    attend_partial,
    causal,
    full,
    key_padding,
    neighborhood,
    per_head,
    relative_table,
    sigmoid,
    sinks,
    softmax,
    window,
)
from foveate.mixers.exact_io.grid_windows import SameLabel

pytestmark = [needs_native, pytest.mark.usefixtures(one_thread.__name__)]

ODD_DIMS = (1, 2, 3, 15, 17, 31, 33, 63, 65, 96, 100, 127, 129, 160, 191, 255, 256)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_agrees_with_the_definition(pattern, lengths) -> None:
    assert_native_agrees(random_call(*lengths) | {"pattern": pattern}, torch.float32)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_agrees_in_half_precision(pattern, dtype: torch.dtype) -> None:
    assert_native_agrees(random_call(*random.choice(LENGTHS)) | {"pattern": pattern}, dtype)


@pytest.mark.long
@pytest.mark.parametrize("turn", range(40))
@every_dtype
def test_agrees_at_random_lengths(turn: int, dtype: torch.dtype) -> None:
    lengths = random.randint(0, 300), random.randint(0, 300)
    assert_native_agrees(random_call(*lengths) | {"pattern": random.choice(PATTERNS)}, dtype)


@every_dtype
def test_patterns_per_head_and_per_batch_entry(dtype: torch.dtype) -> None:
    call = random_call(65, 65)
    own = per_head([random.choice(PATTERNS[:6]) for _ in range(call["q"].shape[1])])
    padded = torch.rand(2, 65) < 0.7
    assert_native_agrees(call | {"pattern": own}, dtype)
    assert_native_agrees(call | {"pattern": own & key_padding(padded) & causal}, dtype)
    assert_native_agrees(call | {"pattern": key_padding(padded)}, dtype)


@pytest.mark.parametrize("pattern", DYNAMIC, ids=str)
def test_patterns_that_look_at_queries_and_keys(pattern) -> None:
    lengths = random.choice([(37, 37), (9, 150), (130, 130)])
    assert_native_agrees(random_call(*lengths) | {"pattern": pattern}, random.choice(DTYPES))


@pytest.mark.parametrize("pattern, layout", [*ON_GRIDS, *ON_POINTS], ids=str)
def test_patterns_on_grids_and_points(pattern, layout) -> None:
    length = layout.length
    call = random_call(random.choice([length, length, 1 + length // 3]), length)
    heads = random.choice([h for h in HEADS if h[0] % pattern.heads == 0])
    call |= {"q": leaf(2, call["q"].shape[2], heads[0], 8, dtype=torch.float64).transpose(1, 2), "bias": None}
    call |= {
        "k": leaf(2, heads[1], length, 8, dtype=torch.float64),
        "v": leaf(2, heads[2], length, 5, dtype=torch.float64),
    }
    assert_native_agrees(call | {"weights": "softmax", "pattern": pattern, "layout": layout}, random.choice(DTYPES))


@every_dtype
def test_tables_shared_by_many_short_windows(dtype: torch.dtype) -> None:
    """More windows than are added up as they are, with masks that hide the first keys and the last."""
    labels = torch.zeros(150, 20, dtype=torch.long)
    labels[::2, :3], labels[1::3, 17:] = 1, 2
    q, k, v = (leaf(150, 2, 20, 8, dtype=torch.float64) for _ in range(3))
    table = relative_table(leaf(2, 7, 9, dtype=torch.float64), (4, 5))
    assert_native_agrees({"q": q, "k": k, "v": v, "pattern": SameLabel(labels), "bias": table}, dtype)


@every_dtype
def test_tables_of_relative_positions_on_grids(dtype: torch.dtype) -> None:
    grids: list[tuple[int, ...]] = [(7, 11), (3, 5, 6), (70,)]
    for dims in grids:
        call = random_call(*[Grid(*dims).length] * 2)
        sides = [2 * random.randint(0, size) + 1 for size in dims]
        table = relative_table(leaf(call["q"].shape[1], *sides, dtype=torch.float64), dims)
        assert_native_agrees(call | {"bias": table, "layout": Grid(*dims), "pattern": window(30)}, dtype)


@every_dtype
def test_packed_sequences(dtype: torch.dtype) -> None:
    call = random_call(130, 130) | {"layout": Packed([30, 0, 47, 1, 52])}
    assert_native_agrees(call | {"pattern": causal}, dtype)
    assert_native_agrees(call | {"pattern": full}, dtype)


@every_dtype
@pytest.mark.parametrize("dim", ODD_DIMS)
def test_heads_of_any_size(dim: int, dtype: torch.dtype) -> None:
    num_queries, num_keys = random.choice([(1, 70), (70, 70), (33, 129)])
    q, k = leaf(1, 2, num_queries, dim, dtype=torch.float64), leaf(1, 1, num_keys, dim, dtype=torch.float64)
    v = leaf(1, 2, num_keys, random.choice(ODD_DIMS), dtype=torch.float64)
    pattern = random.choice([full, causal, window(9) & causal | sinks(4)])
    assert_native_agrees({"q": q, "k": k, "v": v, "pattern": pattern}, dtype)


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", [(8, 9), (64, 32)], ids=str)
def test_tensors_of_any_strides(layout: str, dims: tuple[int, int], dtype: torch.dtype) -> None:
    call = random_call(70, 90)
    call |= {"q": leaf(2, 4, 70, dims[0], dtype=torch.float64), "k": leaf(2, 2, 90, dims[0], dtype=torch.float64)}
    call |= {"v": leaf(2, 4, 90, dims[1], dtype=torch.float64), "bias": None, "weights": "softmax"}
    assert_native_agrees(call | {"pattern": random.choice(PATTERNS)}, dtype, LAYOUTS[layout])


BROADCAST = ((2, 4, 70, 90), (1, 4, 70, 90), (2, 1, 70, 90), (2, 4, 1, 90), (2, 4, 70, 1), (2, 1, 1, 90), (4, 1, 1))
BROADCAST = (*BROADCAST, (90,), (70, 1), (1, 1), (2, 1, 1, 1))


@pytest.mark.parametrize("shape", BROADCAST, ids=str)
def test_biases_that_broadcast(shape: tuple[int, ...]) -> None:
    call = random_call(70, 90) | {"weights": "softmax", "bias": leaf(*shape, dtype=torch.float64)}
    call |= {"q": leaf(2, 4, 70, 8, dtype=torch.float64), "k": leaf(2, 2, 90, 8, dtype=torch.float64)}
    call |= {"v": leaf(2, 1, 90, 5, dtype=torch.float64), "pattern": random.choice(PATTERNS)}
    assert_native_agrees(call, random.choice(DTYPES))


@pytest.mark.parametrize("shape", [(1, 2, 1, 99), (2, 1, 99, 1), (2, 2, 1, 1), (1, 1, 1, 99)], ids=str)
def test_biases_that_broadcast_where_tiles_have_empty_slots(shape: tuple[int, ...]) -> None:
    """A number for each query or for each key, on a grid whose patches hang over its border."""
    q, k, v = (torch.randn(2, 2, 99, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(shape, requires_grad=True)
    results = []
    for impl in ("reference", "native"):
        out = attend(q, k, v, neighborhood(5), bias=bias, layout=Grid(9, 11), weights="sigmoid", impl=impl)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v, bias))])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_a_bias_in_another_precision_and_of_any_strides() -> None:
    q, k, v = (torch.randn(2, 4, 70, 8, dtype=torch.bfloat16) for _ in range(3))
    bias = torch.randn(70, 4, 70).permute(1, 2, 0).requires_grad_()
    exact = attend(q.double(), k.double(), v.double(), bias=bias.double(), impl="reference")
    out = attend(q, k, v, bias=bias, impl="native")
    assert (out.double() - exact).norm() <= 0.01 * exact.norm()
    (expected,), (grad,) = (torch.autograd.grad(x.double().square().sum(), bias) for x in (exact, out))
    assert grad.dtype == torch.float32
    assert (grad - expected).norm() <= 0.03 * expected.norm()


@every_dtype
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0), (1, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("pattern", [full, window(3) & causal | sinks(2)], ids=str)
def test_lengths_of_zero_and_one(lengths: tuple[int, int], pattern, dtype: torch.dtype) -> None:
    call = random_call(*lengths)
    assert_native_agrees(call | {"pattern": pattern}, dtype)
    nobody = {name: call[name][:0] for name in "qkv"} | {"pattern": pattern}
    assert attend(**nobody, impl="reference").shape == attend(**cast(nobody, dtype), impl="native").shape


@pytest.mark.parametrize("weights", ["softmax", "sigmoid", "relu"])
def test_rows_that_see_no_key_are_zero_and_have_zero_gradients(weights: str) -> None:
    for dtype in DTYPES:
        q, k, v = (torch.randn(2, 2, 70, 8, dtype=dtype, requires_grad=True) for _ in range(3))
        for pattern in (window(3) & ~window(3), causal & ~sinks(1) & ~window(0, 1)):
            out = attend(q, k, v, pattern, weights=weights, impl="native")
            assert (out[:, :, 0] == 0).all()
            grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
            assert all(grad.isfinite().all() for grad in grads)
            assert (grads[0][:, :, 0] == 0).all()


@every_dtype
def test_slopes_of_alibi_on_any_offset(dtype: torch.dtype) -> None:
    for lengths in ((1, 200), (70, 3), (130, 130)):
        call = random_call(*lengths)
        slopes = alibi(leaf(call["q"].shape[1], dtype=torch.float64))
        assert_native_agrees(call | {"bias": slopes, "pattern": causal}, dtype)


@pytest.mark.parametrize("num_queries", [3, 64])
def test_sums_over_long_rows_keep_their_digits(num_queries: int) -> None:
    q, k, v = torch.randn(1, 1, num_queries, 16), torch.randn(1, 1, 20_000, 16), torch.rand(1, 1, 20_000, 16)
    exact = attend_partial(q.double(), k.double(), v.double(), impl="reference")
    plain, ours = (attend_partial(q, k, v, impl=impl) for impl in ("reference", "native"))
    for right, one, other in zip(exact, plain, ours, strict=True):
        allowed = 2 * (one.double() - right).norm() + 8 * EPS * right.norm()  # a drift would be a hundred times that
        assert (other.double() - right).norm() <= allowed


def test_biases_that_millions_of_pairs_share_get_exact_gradients() -> None:
    q, k, v = torch.randn(3, 1, 2, 1500, 4).unbind(0)
    grads = []
    for dtype, impl in ((torch.float64, "reference"), (torch.float32, "native")):
        bias = torch.tensor(0.1, dtype=dtype, requires_grad=True)
        out = attend(*(x.to(dtype) for x in (q, k, v.abs())), weights=sigmoid(bias=bias), impl=impl)
        grads.append(torch.autograd.grad(out.sum(), bias)[0].double())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=0)


def a_longer_call(dtype: torch.dtype) -> dict[str, Any]:
    """Many tiles for several threads to share, with gradients of biases that all of them add to."""
    heads, length = 4, 400
    q, k, v = (leaf(2, h, length, d, dtype=torch.float64) for h, d in ((heads, 24), (2, 24), (1, 40)))
    table = relative_table(leaf(heads, 21, dtype=torch.float64))
    call = {"q": q, "k": k, "v": v, "bias": table, "weights": softmax(sink=leaf(heads, dtype=torch.float64))}
    return cast(call | {"pattern": window(150) & causal | sinks(3)}, dtype)


@every_dtype
def test_threads_share_the_work_and_agree(dtype: torch.dtype) -> None:
    assert_native_agrees(a_longer_call(dtype), dtype, threads=(1, 2, 3))


@every_dtype
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_bits_however_threads_are_scheduled(threads: int, bias: bool, dtype: torch.dtype) -> None:
    torch.set_num_threads(threads)
    call = a_longer_call(dtype) | ({} if bias else {"bias": None})
    seeds = torch.randn(2, 4, 400, 40), torch.randn(2, 4, 400)
    first = outcome(call, seeds, "native")
    with other_work():
        for _ in range(8):
            for one, again in zip(first, outcome(call, seeds, "native"), strict=True):
                assert torch.equal(one, again)


@contextmanager
def other_work() -> Iterator[None]:
    """Threads that take the processor away now and then, for moments of random length."""
    done = Event()

    def work() -> None:
        while not done.wait(random.random() / 500):
            torch.randn(random.randint(10, 200), 200).sort()

    workers = [Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        done.set()
        for worker in workers:
            worker.join()


def test_weights_too_small_for_normal_numbers_are_zero_and_the_callers_arithmetic_stays_as_it_was() -> None:
    """Logits 95 apart: float32's exponentials are below its least normal number there."""
    q = torch.full((1, 1, 200, 1), 1.0)
    k = torch.where(torch.arange(200) == 7, 0.0, -95.0).view(1, 1, 200, 1)
    v = torch.ones(1, 1, 200, 1)
    v[0, 0, 7] = 0
    out = attend(q, k, v, scale=1.0, impl="native")
    assert not out.any()
    tiny = torch.tensor(1e-40)
    assert 0 < float(tiny * 0.5) < float(tiny)
