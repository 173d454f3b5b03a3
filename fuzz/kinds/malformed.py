"""Calls that are wrong: refused with TypeError, ValueError or NotImplementedError in a sentence, and never a crash."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import foveate as fv
from fuzz.cases import kind
from fuzz.draw import Draw, shape_of
from fuzz.judge import Disagreement, demand

REFUSALS = (TypeError, ValueError, NotImplementedError)
WORDS = 4  # fewer make no sentence
INTERNAL = ("got an unexpected keyword argument", "missing 1 required", "Traceback", "object has no attribute")

Operator = Callable[..., Any]
Arguments = dict[str, Any]


def attend_call(draw: Draw) -> tuple[Operator, Arguments]:
    batch, heads, n, m, dim = 2, 4, draw.whole(1, 20), draw.whole(1, 20), draw.whole(2, 9)
    shape = {"q": (batch, heads, n, dim), "k": (batch, 2, m, dim), "v": (batch, 2, m, dim)}
    given: Arguments = {name: draw.normal(*size).float() for name, size in shape.items()}
    given["pattern"] = draw.one((fv.full, fv.causal, fv.window(3) & fv.causal, fv.sinks(2)))
    if draw.chance(0.3):
        given["bias"] = draw.normal(heads, n, m).float()
    return draw.one((fv.attend, fv.attend_partial)), given


def recur_call(draw: Draw) -> tuple[Operator, Arguments]:
    batch, heads, n, dim = 2, 4, draw.whole(2, 20), draw.whole(2, 9)
    given: Arguments = {name: draw.normal(batch, heads, n, dim).float() for name in "qkv"}
    if draw.chance(0.5):
        given["decay"] = -draw.uniform(batch, heads, n).float()
    if draw.chance(0.5):
        given["beta"] = draw.uniform(batch, heads, n).float()
    if draw.chance(0.5):
        given["state"] = draw.normal(batch, heads, dim, dim).float()
    return fv.recur, given


def scan_call(draw: Draw) -> tuple[Operator, Arguments]:
    batch, n, channels, states = 2, draw.whole(1, 9), draw.whole(2, 9), draw.whole(2, 5)
    given: Arguments = {
        "x": draw.normal(batch, n, channels).float(),
        "dt": draw.uniform(batch, n, channels).float(),
        "A": -draw.uniform(channels, states).float(),
        "B": draw.normal(batch, n, states).float(),
        "C": draw.normal(batch, n, states).float(),
        "state": draw.normal(batch, channels, states).float(),
    }
    return fv.scan, given


def conv_call(draw: Draw) -> tuple[Operator, Arguments]:
    batch, n, channels = 2, draw.whole(1, 9), draw.whole(2, 9)
    given: Arguments = {"x": draw.normal(batch, n, channels).float(), "weight": draw.normal(channels, 4).float()}
    given |= {"bias": draw.normal(channels).float(), "tail": draw.normal(batch, channels, 3).float()}
    return fv.causal_conv, given


CALLS = (attend_call, attend_call, recur_call, scan_call, conv_call)
FREE = {  # sizes that are each argument's own, or of which several fit
    "attend": {("q", 1), ("q", 2), ("k", 1), ("v", 1), ("v", 3)},
    "attend_partial": {("q", 1), ("q", 2), ("k", 1), ("v", 1), ("v", 3)},
    "recur": {("v", 3)},
    "causal_conv": {("x", 1)},
}


def _other_dtype(draw: Draw, x: Tensor) -> Tensor:
    return x.to(draw.one((torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)))


def _other_shape(draw: Draw, x: Tensor, free: set[int]) -> Tensor:
    axis = draw.one([axis for axis in range(x.dim()) if axis not in free])
    more = x.shape[axis] + draw.one((1, 2, 7))
    return torch.cat([x] * 8, axis).narrow(axis, 0, more)


def _other_dims(draw: Draw, x: Tensor) -> Tensor:
    return draw.one((x[0], x.unsqueeze(0), x.flatten(), x.sum()))


def _other_device(draw: Draw, x: Tensor) -> Tensor:
    return x.to("meta")


def _no_tensor(draw: Draw, x: Tensor) -> Any:
    return draw.one(("text", 3, 1.5, [1.0, 2.0], x.numpy()))


def _sparse(draw: Draw, x: Tensor) -> Tensor:
    return x.to_sparse()


WRONG: tuple[Callable[..., Any], ...] = (
    _other_dtype,
    _other_shape,
    _other_shape,
    _other_dims,
    _other_device,
    _no_tensor,
    _sparse,
)


@kind("malformed", 6)
def tensors(draw: Draw) -> None:
    """One argument made wrong."""
    operator, given = draw.one(CALLS)(draw)
    name = draw.one([n for n, x in given.items() if isinstance(x, Tensor)])
    wrong = draw.one([each for each in WRONG if name != "bias" or each is not _other_dims])  # which broadcast
    free = {axis for argument, axis in FREE.get(operator.__name__, ()) if argument == name}
    given[name] = wrong(draw, given[name], free) if wrong is _other_shape else wrong(draw, given[name])
    said = {n: shape_of(x) for n, x in given.items()}
    refused(partial(operator, **given), f"{operator.__name__}, {name} made wrong by {wrong.__name__}: {said}")


def refused(call: Callable[[], Any], what: str) -> None:
    try:
        with torch.no_grad():
            call()
    except REFUSALS as refusal:
        message = str(refusal)
        demand(len(message.split()) >= WORDS, f"{what} is refused without a sentence: {message!r}")
        demand(not any(words in message for words in INTERNAL), f"{what} is refused in internal words: {message!r}")
    except Exception as error:
        raise Disagreement(f"{what} raises {type(error).__name__}: {error}") from None
    else:
        raise Disagreement(f"{what} is accepted")


@kind("lengths", 3)
def lengths(draw: Draw) -> None:
    """Lengths of packed sequences in any type: taken for what they say, or refused."""
    right = [n for n in draw.split(draw.whole(1, 60))]
    kinds: dict[str, Any] = {
        "floats": [float(n) for n in right],
        "halves": [n + 0.5 for n in right],
        "negative": [-1, *right, 1],
        "tensor": torch.tensor(right),
        "int32": torch.tensor(right, dtype=torch.int32),
        "float tensor": torch.tensor(right, dtype=torch.float32),
        "numpy": np.array(right),
        "bytes": np.array(right, dtype=np.uint8),
        "tuple": tuple(right),
        "sum": [*right, 1],
        "nan": [float("nan"), *right],
        "great": [2**62, 2**62, 2**62, 2**62 + sum(right)],
        "text": "".join(map(str, right)),
        "nothing": [],
        "booleans": [True] * sum(right),
        "nested": [right],
    }
    name = draw.one(tuple(kinds))
    fine = {"tensor", "int32", "numpy", "bytes", "tuple"}
    total, call = sum(right), draw.one((_recur, _scan, _conv, _linear, _attend))
    x = draw.normal(1, total, 6).float()
    expected = call(x, right)
    try:
        got = call(x, kinds[name])
    except REFUSALS as refusal:
        demand(len(str(refusal).split()) >= WORDS, f"lengths {kinds[name]!r} are refused by {refusal!r}")
        return
    except Exception as error:
        raise Disagreement(
            f"{call.__name__} with {name} {kinds[name]!r} raises {type(error).__name__}: {error}"
        ) from None
    demand(name in (*fine, "floats", "float tensor", "booleans"), f"{call.__name__} takes {name} {kinds[name]!r}")
    if name != "booleans":
        demand(torch.equal(got, expected), f"{call.__name__} with {name} {kinds[name]!r} gives another result")


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (2, 3)).transpose(1, 2)


def _recur(x: Tensor, lengths: Any) -> Tensor:
    return fv.recur(_heads(x), _heads(x), _heads(x), lengths=lengths).out


def _scan(x: Tensor, lengths: Any) -> Tensor:
    return fv.scan(x, x.abs(), -torch.ones(6, 2), x[..., :2], x[..., :2], lengths=lengths).out


def _conv(x: Tensor, lengths: Any) -> Tensor:
    return fv.causal_conv(x, torch.ones(6, 3), lengths=lengths).out


def _linear(x: Tensor, lengths: Any) -> Tensor:
    return fv.linear_scan(x, -x.abs(), lengths=lengths).out


def _attend(x: Tensor, lengths: Any) -> Tensor:
    return fv.attend(_heads(x), _heads(x), _heads(x), fv.causal, layout=fv.Packed(lengths))


OPTIONS: tuple[tuple[Operator, str, tuple[Any, ...]], ...] = (
    (fv.window, "left", (-1, 1.5, "3", None, True, 2.0)),
    (fv.sinks, "count", (-1, 0, 1.5, "3", None, True)),
    (fv.blocks, "size", (-1, 0, 1.5, "3", None, True)),
    (fv.strided, "step", (-1, 0, 1.5, "3", None)),
    (fv.prefix, "count", (-1, 0, 1.5, "3", None)),
    (fv.documents, "lengths", ([], [-1], [1.5], ["a"], "ab")),
    (fv.global_tokens, "positions", ([], [-1], ["a"])),
    (fv.topk_keys, "count", (-1, 0, 1.5, "3", None)),
    (fv.within, "radius", (-1, 0, "3", None, float("nan"), float("inf"))),
    (fv.neighborhood, "kernel", (-1, 0, 1.5, "3", None)),
    (fv.window_partition, "window", (-1, 0, 1.5, "3", None)),
    (fv.key_padding, "mask", (torch.ones(3), torch.ones(2, 3), torch.ones(3, dtype=torch.bool), [[True]], None)),
    (fv.Grid, "", (0, -1, 1.5, "3", None)),
    (fv.Packed, "lengths", ([-1], [1.5], ["a"], 3)),
    (
        fv.Points,
        "coords",
        (torch.ones(3), torch.ones(3, 2, dtype=torch.int64), [[1.0]], torch.full((3, 2), float("nan"))),
    ),
)


@kind("options", 2)
def options(draw: Draw) -> None:
    """Constructors of patterns and layouts with arguments that mean nothing."""
    make, name, values = draw.one(OPTIONS)
    value = draw.one(values)
    call = partial(make, value) if not name else partial(make, **{name: value})
    refused(call, f"{make.__name__}({name}={value!r})")
