"""The native decoding kernel against the definition in float64: few queries, long caches, every kind of call."""

from __future__ import annotations

import ctypes
import math
import mmap
import random
from dataclasses import dataclass, replace

import pytest
import torch
from tests.support.native_checks import DTYPES, LAYOUTS, every_dtype, needs_native, one_thread
from torch import Tensor, inf, nan

from foveate.kernels.cpu import call as c
from foveate.kernels.cpu.loader import library
from foveate.patterns.band import UNBOUNDED

pytestmark = [needs_native, pytest.mark.usefixtures(one_thread.__name__)]

HEADS = ((1, 1, 1), (3, 3, 3), (8, 2, 2), (7, 1, 1), (20, 1, 1), (6, 2, 3), (12, 4, 6), (8, 8, 1), (8, 1, 8))
DIMS = (1, 2, 7, 16, 31, 32, 33, 64, 80, 96, 127, 128, 130, 256)
KINDS = tuple(c.KINDS)
# Errors allowed, of the sum of |weight * value|, and of the sum of |logit * value| if no products in a logit cancelled.
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
LOGITS_CLOSE = 1e-6


@dataclass(frozen=True)
class Options:
    low: int = -UNBOUNDED
    high: int = UNBOUNDED
    kind: str = "softmax"
    softcap: float = 0.0
    scale: float = 0.3
    threads: int = 1


@dataclass(frozen=True)
class Expected:
    out: Tensor
    lse: Tensor
    allowed: Tensor  # error of `out`


def decode(q: Tensor, k: Tensor, v: Tensor, options: Options, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the kernel writes over NaN."""
    out = q.new_full((*q.shape[:3], v.shape[3]), nan) if out is None else out
    lse = torch.full(q.shape[:3], nan, dtype=torch.float64)
    assert kernel()(ctypes.byref(arguments(q, k, v, options, out, lse.data_ptr()))) == 0
    return out, lse


def kernel() -> ctypes._NamedFuncPointer:
    function = library().foveate_attend_decode
    function.argtypes, function.restype = (ctypes.POINTER(c.AttendArgument),), ctypes.c_int64
    return function


def arguments(q: Tensor, k: Tensor, v: Tensor, options: Options, out: Tensor, lse: int | None) -> c.AttendArgument:
    return c.AttendArgument(
        **{name: c.tensor(x, x.dtype, *x.shape) for name, x in {"q": q, "k": k, "v": v, "out": out}.items()},
        lse=lse,
        dtype=c.DTYPES[q.dtype],
        kind=c.KINDS[options.kind],
        threads=options.threads,
        batch=q.shape[0],
        num_queries=q.shape[2],
        num_keys=k.shape[2],
        dim=q.shape[3],
        value_dim=v.shape[3],
        scale=options.scale,
        softcap=options.softcap,
        selection=c.SelectionArgument(band_low=options.low, band_high=options.high),
    )


def defined(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Expected:
    """The definition, in float64."""
    close = CLOSE[q.dtype]
    q, k, v = (repeated(x.double(), q.shape[1]) for x in (q, k, v))
    scores = q @ k.mT * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    distance = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2] - torch.arange(k.shape[2])
    hidden = (distance < options.low) | (distance > options.high)
    scores = scores.masked_fill(hidden, -inf)
    lse = scores.logsumexp(-1) if options.kind == "softmax" else torch.full(q.shape[:3], -inf)
    weigh = {"softmax": lambda x: torch.softmax(x, -1), "sigmoid": torch.sigmoid, "relu": torch.relu}[options.kind]
    weights = weigh(scores).masked_fill(hidden.all(-1, keepdim=True), 0)
    uncancelled = (q.abs() @ k.abs().mT * abs(options.scale)).masked_fill(hidden, 0)
    return Expected(weights @ v, lse.double(), (close * weights + LOGITS_CLOSE * uncancelled) @ v.abs())


def repeated(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def inputs(heads: tuple[int, int, int], queries: int, keys: int, dims: tuple[int, int], dtype: torch.dtype, batch=1):
    shapes = zip(heads, (queries, keys, keys), (dims[0], *dims), strict=True)
    return [torch.randn(batch, h, n, d).to(dtype) for h, n, d in shapes]


def assert_as_defined(q: Tensor, k: Tensor, v: Tensor, options: Options, out: Tensor | None = None) -> None:
    out, lse = decode(q, k, v, options, out)
    expected = defined(q, k, v, options)
    error = (out - expected.out).abs()
    assert (error <= expected.allowed + torch.finfo(q.dtype).tiny).all(), f"{options}: {error.max()}"
    torch.testing.assert_close(lse.double(), expected.lse, rtol=1e-5, atol=1e-4)


def random_options() -> Options:
    return Options(
        low=random.choice((-UNBOUNDED, 0, 0, -3, 2)),
        high=random.choice((UNBOUNDED, UNBOUNDED, 2, 40, 100)),
        kind=random.choice(("softmax", *KINDS)),
        softcap=random.choice((0.0, 2.0)),
        scale=random.choice((0.3, 1.0, 0.0, -0.2)),
        threads=random.choice((1, 2)),
    )


@pytest.mark.parametrize("run", range(60))
@every_dtype
def test_random_calls(dtype: torch.dtype, run: int) -> None:
    queries, keys = random.choice((1, 1, 2, 3, 5, 8, 16, 19)), random.choice((0, 1, 2, 15, 63, 64, 65, 130, 300))
    dims = random.choice(DIMS), random.choice(DIMS)
    q, k, v = inputs(random.choice(HEADS), queries, keys, dims, dtype, batch=random.randint(1, 2))
    assert_as_defined(q, k, v, random_options())


@pytest.mark.parametrize("threads", (1, 2, 3))
@pytest.mark.parametrize("heads", ((1, 1, 1), (4, 1, 1), (8, 2, 2), (16, 2, 1)), ids=str)
@every_dtype
def test_long_caches(dtype: torch.dtype, heads, threads: int) -> None:
    q, k, v = inputs(heads, 2, 4999, (64, 32), dtype)
    assert_as_defined(q, k, v, Options(low=0, threads=threads))
    assert_as_defined(q, k, v, Options(low=0, high=3000, kind="sigmoid", threads=threads))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@every_dtype
def test_heads_that_alternate_in_memory(dtype: torch.dtype, heads) -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(heads, 3, 1100, (64, 64), dtype, batch=2))
    assert_as_defined(q, k, v, Options(low=0, threads=2))


@pytest.mark.parametrize("layout", LAYOUTS)
@every_dtype
def test_strides(dtype: torch.dtype, layout: str) -> None:
    q, k, v = (LAYOUTS[layout](x) for x in inputs((6, 3, 3), 3, 150, (32, 64), dtype, batch=2))
    assert_as_defined(q, k, v, Options(low=0, threads=2))
    assert_as_defined(q.contiguous(), k.contiguous(), v, Options())


@every_dtype
def test_writes_where_the_strides_of_out_say(dtype: torch.dtype) -> None:
    q, k, v = inputs((4, 2, 2), 3, 70, (40, 24), dtype)
    wide = torch.full((1, 3, 4, 3 * 24 + 1), nan, dtype=dtype)
    assert_as_defined(q, k, v, Options(), out=wide.transpose(1, 2)[..., 1::3])
    assert wide[..., 0::3].isnan().all() and wide[..., 2::3].isnan().all()


def test_long_rows_of_heads_and_queries() -> None:
    q, k, v = inputs((32, 1, 1), 16, 200, (64, 64), torch.bfloat16)
    assert_as_defined(q, k, v, Options(low=0))


@every_dtype
def test_the_same_bits_every_time(dtype: torch.dtype) -> None:
    q, k, v = inputs((8, 2, 2), 1, 5000, (64, 64), dtype)
    first, *others = (decode(q, k, v, Options(threads=2)) for _ in range(5))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@every_dtype
def test_rows_that_see_no_key_are_zero(dtype: torch.dtype, kind: str) -> None:
    q, k, v = inputs((4, 2, 2), 6, 3, (16, 16), dtype)
    out, lse = decode(q, k, v, Options(low=0, kind=kind))
    assert (out[:, :, :3] == 0).all() and (lse[:, :, :3] == -inf).all()
    assert (out[:, :, 3:] != 0).any()
    out, lse = decode(q, k[:, :, :0], v[:, :, :0], Options(kind=kind))
    assert (out == 0).all() and (lse == -inf).all()


@pytest.mark.parametrize("shape", ((0, 4, 1), (1, 4, 0), (2, 0, 1)), ids=str)
def test_nothing_to_do(shape) -> None:
    batch, heads, queries = shape
    q, k = torch.empty(batch, heads, queries, 8), torch.empty(batch, max(heads, 1), 5, 8)
    out, lse = decode(q, k, k, Options(threads=2))
    assert out.numel() == lse.numel() == 0


@pytest.mark.parametrize("threads", (1, 2))
@every_dtype
def test_keys_outside_the_band_are_not_read(dtype: torch.dtype, threads: int) -> None:
    q, k, v = inputs((8, 2, 2), 1, 5000, (32, 32), dtype)
    seen = slice(5000 - 1 - 3000, 5000 - 1 - 9)
    expected = decode(q, k[:, :, seen], v[:, :, seen], Options())
    for x in (k, v):
        x[:, :, : seen.start], x[:, :, seen.stop :] = nan, nan
    got = decode(q, k, v, Options(low=10, high=3000, threads=threads))
    torch.testing.assert_close(got[0], expected[0], rtol=2**-6, atol=2**-9)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("where", ("k", "v", "q"))
@pytest.mark.parametrize("bad", (nan, inf, -inf))
@every_dtype
def test_what_is_not_a_number_spreads_as_in_plain_softmax(dtype: torch.dtype, bad: float, where: str, threads) -> None:
    q, k, v = tensors = inputs((12, 2, 2), 1, 2999, (32, 16), dtype)
    dict(zip("qkv", tensors, strict=True))[where][0, 0, -1, 5] = bad
    out, lse = decode(q, k, v, Options(threads=threads))
    expected = defined(q, k, v, Options())
    torch.testing.assert_close(out.isnan(), expected.out.isnan())
    torch.testing.assert_close(lse.isfinite(), expected.lse.isfinite())
    whole = expected.out.isfinite()
    torch.testing.assert_close(out.double()[whole], expected.out[whole], rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("logit", (1e4, -1e4, 0.0))
@every_dtype
def test_logits_all_alike(dtype: torch.dtype, logit: float) -> None:
    _, _, v = inputs((1, 1, 1), 1, 300, (1, 48), dtype)
    q, k = torch.full((1, 6, 2, 1), logit, dtype=dtype), torch.ones(1, 1, 300, 1, dtype=dtype)
    out, lse = decode(q, k, v, Options(scale=1.0, threads=2))
    torch.testing.assert_close(out.double(), v.double().mean(2, keepdim=True).expand_as(out), rtol=0, atol=2**-8)
    expected = torch.full_like(lse, q.double()[0, 0, 0, 0].item() + math.log(300))
    torch.testing.assert_close(lse, expected, rtol=1.3e-6, atol=1e-5)


@every_dtype
def test_logits_far_apart(dtype: torch.dtype) -> None:
    q, k, v = inputs((4, 2, 2), 2, 700, (64, 64), dtype)
    assert_as_defined(q, k * 60, v, Options(scale=1.0, threads=2))


@every_dtype
def test_lse_is_optional(dtype: torch.dtype) -> None:
    q, k, v = inputs((4, 2, 2), 2, 100, (16, 16), dtype)
    out = torch.full_like(q, nan)
    assert kernel()(ctypes.byref(arguments(q, k, v, Options(), out, None))) == 0
    assert torch.equal(out, decode(q, k, v, Options())[0])


def test_more_than_31_bits_of_elements() -> None:
    """Keys and values 16 million numbers apart, in memory of which only the rows are ever touched."""
    keys, apart, dim = 140, 2**24, 32
    with mmap.mmap(-1, 2 * (keys * apart + dim)) as memory:
        far = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((1, 1, keys, dim), (0, 0, apart, 1))
        q, k, v = inputs((6, 1, 1), 2, keys, (dim, dim), torch.bfloat16)
        far.copy_(k)
        assert_as_defined(q, far, v, Options(low=0))
        far.copy_(v)
        assert_as_defined(q[:, :2], k, far, Options(low=0))
        del far


def test_threads_only_change_the_last_bits() -> None:
    q, k, v = inputs((4, 1, 1), 1, 5000, (64, 64), torch.float32)
    one, *others = (decode(q, k, v, replace(Options(), threads=n)) for n in (1, 2, 5))
    for other in others:
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_it_says_for_how_many_queries_it_is_the_faster() -> None:
    most = library().foveate_decode_queries
    most.argtypes, most.restype = (ctypes.c_int64,), ctypes.c_int64
    assert 1 < most(10) <= most(10**6) <= 64


def test_every_dtype_has_its_tolerance() -> None:
    assert set(CLOSE) == set(DTYPES)
