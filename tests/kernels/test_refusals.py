"""The C interface refuses descriptions that no tensors have, before it reads a number."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from foveate import attend, causal, recur, sinks, topk_blocks, window
from foveate.kernels.cpu.call import AttendArgument
from foveate.kernels.cpu.loader import library
from foveate.recurrence.linear.impl.abi import RecurArgument

pytestmark = pytest.mark.skipif(library() is None, reason="no native kernels")


def spoil(monkeypatch: pytest.MonkeyPatch, kind: type, field: str, value: Any) -> None:
    """Change a field of every description of this kind on its way to a kernel."""
    real = ctypes.byref

    def changed(argument: Any, *more: Any) -> Any:
        if isinstance(argument, kind):
            *path, last = field.split(".")
            inner: Any = argument
            for name in path:
                inner = getattr(inner, name)
            setattr(inner, last, value)
        return real(argument, *more)

    monkeypatch.setattr(ctypes, "byref", changed)


ATTEND = [
    ("dtype", 7),
    ("dtype", -1),
    ("kind", 3),
    ("threads", 0),
    ("batch", -1),
    ("num_queries", -3),
    ("num_keys", -1),
    ("dim", 5000),
    ("value_dim", -1),
    ("num_biases", -1),
    ("q.heads", -2),
    ("k.heads", 0),
    ("v.heads", 3),
    ("q.data", None),
    ("k.data", None),
    ("out.data", None),
]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("field", "value"), ATTEND)
def test_attention_refuses(monkeypatch: pytest.MonkeyPatch, field: str, value: Any, backward: bool) -> None:
    q, k, v = (torch.randn(2, 4, 70, 8, requires_grad=backward) for _ in range(3))
    out = attend(q, k, v, causal, impl="native") if backward else None
    spoil(monkeypatch, AttendArgument, field, value)
    with pytest.raises(RuntimeError, match="description that no tensors have"):
        attend(q, k, v, causal, softcap=9.0, impl="native") if out is None else out.sum().backward()


@pytest.mark.parametrize(("field", "value"), [("batches", 3), ("batches", 0), ("heads", 3), ("heads", 0)])
@pytest.mark.parametrize("pattern", [window(9) & causal | sinks(2), topk_blocks(16, k=2)])
def test_lists_refuse(monkeypatch: pytest.MonkeyPatch, pattern: Any, field: str, value: int) -> None:
    q, k, v = torch.randn(3, 2, 4, 90, 8)
    spoil(monkeypatch, AttendArgument, f"selection.{field}", value)
    with pytest.raises(RuntimeError, match="description that no tensors have"):
        attend(q, k, v, pattern, impl="native")


RECUR = [
    ("sequences", -1),
    ("states", -1),
    ("tokens", -1),
    ("dim", -1),
    ("value_dim", -4),
    ("threads", 0),
    ("decay_channels", 3),
    ("q.dtype", 9),
    ("decay.dtype", -1),
    ("k.heads", 0),
    ("q.data", None),
    ("v.data", None),
]


@pytest.mark.parametrize(("field", "value"), RECUR)
def test_recurrences_refuse(monkeypatch: pytest.MonkeyPatch, field: str, value: Any) -> None:
    q, k, v = (torch.randn(2, 4, 70, 8, requires_grad=True) for _ in range(3))
    decay = -torch.rand(2, 4, 70, 8)
    out = recur(q, k, v, decay=decay, impl="native").out
    spoil(monkeypatch, RecurArgument, field, value)
    for run in (lambda: recur(q, k, v, decay=decay, impl="native"), lambda: out.sum().backward()):
        with pytest.raises(RuntimeError, match="description that no tensors have"):
            run()
