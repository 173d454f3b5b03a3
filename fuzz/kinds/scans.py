"""scan, linear_scan, causal_conv and evolve: against loops over tokens and sums over taps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

import foveate as fv
from foveate.recurrence import evolve, evolve_shared
from fuzz.cases import kind
from fuzz.draw import DTYPES, Draw
from fuzz.judge import Judge, demand
from fuzz.kinds.recur import connected
from fuzz.settings import anything

Formula = Callable[[dict[str, Tensor], "Call"], list[Tensor]]


@dataclass
class Call:
    """An operator's call: its tensors by name, those along time among them, and the formula it must follow."""

    operator: Callable[..., Any]
    formula: Formula
    tensors: dict[str, Tensor]
    timed: tuple[str, ...]
    carried: str
    low: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    lengths: list[int] | None = None

    def definition(self, *tensors: Tensor) -> list[Tensor]:
        """The formula on each packed sequence."""
        given = dict(zip(self.tensors, tensors, strict=True))
        if self.lengths is None:
            return self.formula(given, self)
        outs, states, first = [], [], 0
        for number, length in enumerate(self.lengths):
            part = {n: x[:, first : first + length] if n in self.timed else x for n, x in given.items()}
            if self.carried in part:
                part[self.carried] = part[self.carried][number : number + 1]
            out, state = self.formula(part, self)
            outs.append(out)
            states.append(state)
            first += length
        return [torch.cat(outs, 1), torch.cat(states, 0)]

    def sizes(self, *tensors: Tensor) -> list[Tensor]:
        logs = ("dt", "A", "dt_bias", "decay", "z")
        return self.definition(*(x if n in logs else x.abs() for n, x in zip(self.tensors, tensors, strict=True)))


def tokens(draw: Draw, most: int = 66) -> tuple[int, int, int, list[int] | None]:
    """Batch, length, channels and perhaps what is packed."""
    length = draw.length(draw.one((9,) * 14 + (33,) * 3 + (most,)))
    channels = draw.dim(130)
    if draw.chance(0.2):
        return 1, length, channels, draw.split(length)
    return draw.batch(), length, channels, None


def scan_call(draw: Draw, length: int | None = None) -> Call:
    batch, n, channels, lengths = tokens(draw)
    if length is not None:
        n, lengths = length, None
    states, groups, dtype = draw.one((1, 2, 3, 4, 8, 15, 16, 17)), draw.divisor(channels), draw.one(DTYPES)
    groups = groups if draw.chance(0.3) else 1
    low = torch.promote_types(dtype, torch.float32)
    soft = draw.chance(0.7)
    steps = draw.normal(batch, n, channels) if soft else draw.uniform(batch, n, channels)
    shape = (batch, n, groups, states) if groups > 1 or draw.chance(0.2) else (batch, n, states)
    given = {
        "x": draw.tensor(batch, n, channels, dtype=dtype, contents=draw.one(("normal", "normal", "tiny", "zeros"))),
        "dt": steps.to(dtype),
        "A": (-draw.one((0.1, 4.0)) * draw.uniform(channels, states)).to(draw.one((dtype, low))),
        "B": draw.tensor(*shape, dtype=dtype),
        "C": draw.tensor(*shape, dtype=dtype),
    }
    extras = {"D": (channels,), "dt_bias": (channels,), "z": (batch, n, channels)}
    for name, size in extras.items():
        if draw.chance(0.5):
            given[name] = draw.uniform(*size).to(dtype) if name == "dt_bias" else draw.tensor(*size, dtype=dtype)
    if draw.chance(0.4):
        given["state"] = draw.tensor(len(lengths) if lengths else batch, channels, states, dtype=low)
    return Call(fv.scan, by_token, given, ("x", "dt", "B", "C", "z"), "state", low, {"softplus": soft}, lengths)


def by_token(given: dict[str, Tensor], call: Call) -> list[Tensor]:
    x, A = given["x"], given["A"]
    dt = given["dt"] + given["dt_bias"] if "dt_bias" in given else given["dt"]
    dt = softplus(dt) if call.options["softplus"] else dt
    B, C = (given[name] if given[name].dim() == 4 else given[name].unsqueeze(2) for name in "BC")
    B, C = (y.repeat_interleave(x.shape[2] // y.shape[2], 2) for y in (B, C))
    state = given.get("state", x.new_zeros(x.shape[0], *A.shape))
    outs = []
    for t in range(x.shape[1]):
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * x[:, t]).unsqueeze(-1) * B[:, t]
        outs.append((C[:, t] * state).sum(-1))
    y = torch.stack(outs, 1) if outs else x
    y = y + given["D"] * x if "D" in given else y
    return [y * silu(given["z"]) if "z" in given else y, state]


def linear_call(draw: Draw) -> Call:
    batch, n, channels, lengths = tokens(draw, 130)
    dtype = draw.one(DTYPES)
    low = torch.promote_types(dtype, torch.float32)
    decay = -draw.one((0.1, 3.0)) * draw.uniform(batch, n, channels)
    if draw.chance(0.2):
        decay = decay.masked_fill(draw.bits(0.1, *decay.shape), draw.one((0.0, float("-inf"))))
    given = {"x": draw.tensor(batch, n, channels, dtype=dtype, contents=draw.contents()), "decay": decay.to(dtype)}
    if draw.chance(0.5):
        given["state"] = draw.tensor(len(lengths) if lengths else batch, channels, dtype=low)
    return Call(fv.linear_scan, faded, given, ("x", "decay"), "state", low, {}, lengths)


def faded(given: dict[str, Tensor], call: Call) -> list[Tensor]:
    x = given["x"]
    state, outs = given.get("state", x.new_zeros(x.shape[0], x.shape[2])), []
    for t in range(x.shape[1]):
        state = given["decay"][:, t].exp() * state + x[:, t]
        outs.append(state)
    return [torch.stack(outs, 1) if outs else x, state]


def conv_call(draw: Draw) -> Call:
    batch, n, channels, lengths = tokens(draw, 130)
    dtype, width = draw.one(DTYPES), draw.one((1, 2, 3, 4, 4, 4, 5, 7, 13, 64, 70))
    low = torch.promote_types(dtype, torch.float32)
    given = {
        "x": draw.tensor(batch, n, channels, dtype=dtype, contents=draw.contents()),
        "weight": draw.tensor(channels, width, dtype=draw.one((dtype, low))),
    }
    if draw.chance(0.5):
        given["bias"] = draw.tensor(channels, dtype=dtype)
    if draw.chance(0.5):
        given["tail"] = draw.tensor(len(lengths) if lengths else batch, channels, width - 1, dtype=dtype)
    options = {"activation": "silu"} if draw.chance(0.5) else {}
    return Call(fv.causal_conv, taps, given, ("x",), "tail", low, options, lengths)


def taps(given: dict[str, Tensor], call: Call) -> list[Tensor]:
    x, weight = given["x"], given["weight"]
    width, length = weight.shape[1], x.shape[1]
    before = given["tail"].mT if "tail" in given else x.new_zeros(x.shape[0], width - 1, x.shape[2])
    seen = torch.cat([before, x], 1)
    out = sum((seen[:, i : i + length] * weight[:, i] for i in range(width)), torch.zeros_like(x))
    out = out + given["bias"] if "bias" in given else out
    return [silu(out) if call.options else out, seen[:, length:].mT]


def ran(draw: Draw, call: Call, tensors: dict[str, Tensor]) -> list[Tensor]:
    impl = "auto" if draw.chance(0.9) else "chunks"
    with anything(draw):
        return list(call.operator(**tensors, **call.options, lengths=call.lengths, impl=impl))


def compared(draw: Draw, call: Call) -> None:
    with torch.no_grad():
        results = ran(draw, call, {name: draw.placed(x) for name, x in call.tensors.items()})
    demand(results[0].dtype == call.tensors["x"].dtype, f"out is {results[0].dtype}, x {call.tensors['x'].dtype}")
    judge = Judge(call.definition, list(call.tensors.values()), call.low, call.sizes, ulps=8)
    judge(["out", call.carried], results)


def differentiated(draw: Draw, call: Call) -> None:
    leaves = {name: draw.placed(x).detach().requires_grad_() for name, x in call.tensors.items()}
    results = connected(ran(draw, call, leaves), list(leaves.values()))
    towards = [draw.tensor(*x.shape, dtype=x.dtype) for x in results]
    placed = [draw.placed(x) for x in towards]
    grads = torch.autograd.grad(results, list(leaves.values()), placed, allow_unused=True, materialize_grads=True)
    count = len(leaves)

    def gradients(*tensors: Tensor) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in tensors[:count]]
        outs = connected(call.definition(*inputs), inputs)
        return list(torch.autograd.grad(outs, inputs, tensors[count:], allow_unused=True, materialize_grads=True))

    def sizes(*tensors: Tensor) -> list[Tensor]:
        logs = ("dt", "A", "dt_bias", "decay", "z")
        names = [*call.tensors, *("towards" for _ in towards)]
        sums = gradients(*(x if n in logs else x.abs() for n, x in zip(names, tensors, strict=True)))
        whole = max((float(x.abs().sum()) for x in sums), default=0.0)
        return [x.abs() + (whole if n in logs else 0.0) for n, x in zip(call.tensors, sums, strict=True)]

    judge = Judge(gradients, [*call.tensors.values(), *towards], call.low, sizes, ulps=16)
    judge([f"gradient of {name}" for name in leaves], grads)


@kind("scan", 5)
def scans(draw: Draw) -> None:
    compared(draw, scan_call(draw))


@kind("scan_step", 6)
def steps(draw: Draw) -> None:
    call = scan_call(draw, 1)
    call.operator = fv.scan_step
    with torch.no_grad(), anything(draw):
        results = list(fv.scan_step(**{name: draw.placed(x) for name, x in call.tensors.items()}, **call.options))
    judge = Judge(call.definition, list(call.tensors.values()), call.low, call.sizes, ulps=8)
    judge(["out", "state"], results)


@kind("linear_scan", 4)
def linear(draw: Draw) -> None:
    compared(draw, linear_call(draw))


@kind("conv", 7)
def convolutions(draw: Draw) -> None:
    compared(draw, conv_call(draw))


@kind("scan_backward", 3)
def backward(draw: Draw) -> None:
    differentiated(draw, draw.one((scan_call, linear_call, conv_call, conv_call))(draw))


@kind("ssm", 2)
def state_spaces(draw: Draw) -> None:
    """S4D by transforms and S5 by doubling."""
    batch, n, channels, states = draw.batch(), draw.length(66), draw.whole(1, 9), draw.whole(1, 5)
    shape = (channels, states)
    parts = [-draw.uniform(*shape), 6 * draw.normal(*shape), *(draw.normal(*shape) for _ in range(4))]
    x = draw.normal(batch, n, channels)
    state = [draw.normal(batch, *shape), draw.normal(batch, *shape)] if draw.chance(0.5) else []
    parts = [y.float() for y in (*parts, x, *state)]

    def definition(*given: Tensor) -> list[Tensor]:
        fading, write, read = (torch.complex(a, b) for a, b in zip(given[0:6:2], given[1:6:2], strict=True))
        h = torch.complex(*given[7:]) if len(given) > 7 else torch.zeros(batch, *shape, dtype=fading.dtype)
        outs = []
        for t in range(n):
            h = fading.exp() * h + write * given[6][:, t].unsqueeze(-1)
            outs.append(2 * (read * h).sum(-1).real)
        return [torch.stack(outs, 1) if outs else given[6], h.real, h.imag]

    def sizes(*given: Tensor) -> list[Tensor]:
        zeros, big = (
            torch.zeros_like(given[0]),
            [torch.complex(a, b).abs() for a, b in ((given[2], given[3]), (given[4], given[5]))],
        )
        held = [torch.complex(*given[7:]).abs(), torch.zeros_like(given[7])] if len(given) > 7 else []
        found = definition(given[0], zeros, big[0], zeros, big[1], zeros, given[6].abs(), *held)
        return [y + y.amax() if y.numel() else y for y in (found[0], found[1], found[1])]

    arguments = [torch.complex(a, b) for a, b in zip(parts[0:6:2], parts[1:6:2], strict=True)]
    with torch.no_grad(), anything(draw):
        out, after = evolve(
            draw.placed(x.float()), *arguments, state=torch.complex(*state).to(torch.complex64) if state else None
        )
    assert after is not None
    Judge(definition, parts, torch.float32, sizes, ulps=16)(["out", "state", "state"], [out, after.real, after.imag])


@kind("ssm_shared", 2)
def shared_states(draw: Draw) -> None:
    batch, n, states = draw.batch(), draw.length(66), draw.whole(1, 9)
    parts = [draw.normal(batch, n, states), draw.normal(batch, n, states), -draw.uniform(states), draw.normal(states)]
    parts = [y.float() for y in parts]

    def definition(*given: Tensor) -> list[Tensor]:
        u, fading = torch.complex(*given[:2]), torch.complex(*given[2:]).exp()
        h, outs = torch.zeros_like(u[:, 0]) if n else u.new_zeros(batch, states), []
        for t in range(n):
            h = fading * h + u[:, t]
            outs.append(h)
        found = torch.stack(outs, 1) if outs else u
        return [found.real, found.imag]

    with torch.no_grad(), anything(draw):
        out, _ = evolve_shared(torch.complex(*parts[:2]), torch.complex(*parts[2:]))

    def sizes(*given: Tensor) -> list[Tensor]:
        held = definition(
            torch.complex(*given[:2]).abs(), torch.zeros_like(given[1]), given[2], torch.zeros_like(given[3])
        )
        return [held[0], held[0]]

    Judge(definition, parts, torch.float32, sizes, ulps=16)(["real", "imaginary"], [out.real, out.imag])
