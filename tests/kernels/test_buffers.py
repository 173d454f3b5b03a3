"""Native kernels get no address that was not looked at, and make their buffers whatever torch's defaults are."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import foveate
from foveate import (
    Grid,
    attend,
    attend_partial,
    causal,
    causal_conv,
    documents,
    global_tokens,
    linear_scan,
    neighborhood,
    random_blocks,
    recur,
    relative_table,
    scan,
    sinks,
    topk_blocks,
    vertical_slash,
    window,
)
from foveate.kernels.cpu import call
from foveate.kernels.cpu.loader import library
from foveate.layouts.kinds import Layout
from foveate.patterns.algebra import Pattern

SOURCES = Path(foveate.__file__).parent
CHOKE_POINTS = {
    "kernels/cpu/call.py",
    "kernels/cpu/short.py",
    "attention/impl/short.py",
    "recurrence/linear/impl/short.py",
    "recurrence/selective/impl/short.py",
}
FACTORIES = {"empty", "zeros", "ones", "full", "tensor", "arange", "eye", "linspace", "rand", "randn"}


def everything(length: int) -> list[Tensor]:
    """What native kernels give of the same inputs, whatever torch's defaults are."""
    numbers = torch.Generator().manual_seed(length)

    def x(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=numbers, dtype=torch.float32, device="cpu")
        return made.requires_grad_()

    return [*_attended(length, x), *_recurred(length, x)]


def _attended(length: int, x: Callable[..., Tensor]) -> list[Tensor]:
    cases: list[tuple[Pattern, Layout | None]] = [
        (causal, None),
        (window(9) & causal | sinks(3), None),
        (topk_blocks(8, k=2) | window(4), None),
        (documents([40, 0, length - 40]) & causal | global_tokens([3, 50]), None),
        (neighborhood(5), Grid(5, length // 5)),
        (vertical_slash(5, 5), None),
        (random_blocks(8, 0.5), None),
    ]
    found = []
    for pattern, layout in cases:
        q, k, v, table = x(2, 4, length, 8), x(2, 2, length, 8), x(2, 2, length, 8), x(4, 9)
        for bias in (None, relative_table(table)):
            out, lse = attend_partial(q, k, v, pattern, bias=bias, layout=layout, impl="native")
            assert lse is not None
            wanted = [q, k, v] if bias is None else [q, k, v, table]
            found += [out, lse, *torch.autograd.grad(out.square().sum(), wanted)]
    with torch.no_grad():  # the short way of a decoding step
        return [*found, attend(q[:, :, -1:], k, v, causal)]


def _recurred(length: int, x: Callable[..., Tensor]) -> list[Tensor]:
    q, k, v = x(1, 2, length, 8), torch.nn.functional.normalize(x(1, 2, length, 8), dim=-1), x(1, 2, length, 5)
    decay, beta = -x(1, 2, length).exp(), x(1, 2, length).sigmoid()
    u, dt, A, B, C = x(1, length, 6), x(1, length, 6), -x(6, 4).exp(), x(1, length, 4), x(1, length, 4)
    w, b, found = x(6, 3), x(6), []
    for lengths in (None, [30, 0, length - 30]):
        out, state = recur(q, k, v, decay=decay, beta=beta, lengths=lengths, impl="native")
        found += [out, state, *torch.autograd.grad(out.square().sum() + state.sum(), [q, k, v, decay, beta])]
        out, state = scan(u, dt, A, B, C, softplus=True, lengths=lengths, impl="native")
        found += [out, state, *torch.autograd.grad(out.square().sum() + state.sum(), [u, dt, A, B, C])]
        out, state = linear_scan(u, -dt.exp(), lengths=lengths, impl="native")
        found += [out, state, *torch.autograd.grad(out.square().sum(), [u, dt])]
        out, tail = causal_conv(u, w, b, lengths=lengths, impl="native")
        found += [out, tail, *torch.autograd.grad(out.square().sum(), [u, w, b])]
    with torch.no_grad():
        return [*found, *recur(q, k, v, decay=decay), *scan(u[:, :1], dt[:, :1].exp(), A, B[:, :1], C[:, :1])]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
}


@pytest.mark.skipif(library() is None, reason="there are no native kernels here")
@pytest.mark.parametrize("default", DEFAULTS)
def test_default_dtype_and_device_change_nothing(default: str) -> None:
    length = 75 + 5 * list(DEFAULTS).index(default)  # of its own, so that nothing is kept from an earlier call
    with DEFAULTS[default]():
        got = everything(length)
    for one, other in zip(got, everything(length), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_addresses_are_taken_in_one_place() -> None:
    """That of a whole storage tells who shares it, and goes to no kernel."""
    taken = re.compile(r"(?<!untyped_storage\(\))\.data_ptr\(\)")
    takes = {str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.py") if taken.search(path.read_text())}
    assert takes == CHOKE_POINTS


def test_every_buffer_names_its_device() -> None:
    """And its dtype, unless that follows from the values."""
    nameless = []
    for part in ("attention", "recurrence", "kernels", "patterns", "cache"):
        for path in (SOURCES / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}:
                    named = {keyword.arg for keyword in node.keywords}
                    needs = {"device"} if ast.unparse(node.func) == "torch.arange" else {"device", "dtype"}
                    nameless += [f"{path.name}:{node.lineno}"] * bool(needs - named)
    assert not nameless


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), "was to read torch.float32"),
        (torch.zeros(3, 2), r"was given torch.float32 \(3, 2\)"),
        (torch.zeros(3, 2).T, "in order"),
        (torch.zeros(2, 3, device="meta"), "on a CPU"),
        (torch.zeros(2, 3, dtype=torch.complex64).conj().imag, "in order|plain memory"),
        (torch._efficientzerotensor((2, 3)), "lost its memory"),
    ],
)
def test_what_a_kernel_was_not_promised_is_refused(x: Tensor, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call.pointer(x, torch.float32, 2, 3)


def test_freed_memory_is_refused() -> None:
    x = torch.zeros(2, 3)
    x.untyped_storage().resize_(8)
    with pytest.raises(ValueError, match="lost its memory"):
        call.pointer(x, torch.float32, 2, 3)
