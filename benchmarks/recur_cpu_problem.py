"""One call of `recur` or `scan`: its tensors, how a contender is run on it, and the part of it that is checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from benchmarks.contest import Run
from benchmarks.field import Settings, Work, worst_row
from benchmarks.recur_cpu_plain import recur_loop, scan_loop
from foveate.recurrence import recur
from foveate.recurrence.selective.api import scan

Function = Callable[..., Tensor]  # of a problem's tensors by name
Place = tuple[slice, ...]

TOLERANCE = 2e-4  # of a row
BACKWARD = 2.0  # operations of a backward pass beside one forward
COLUMNS = 8  # of values, or channels of a scan, that are looked at
DECAYS = {"none": 0, "head": 1, "token": 1, "channel": 1}  # operations for each number of the state


@dataclass(frozen=True, eq=False)
class Problem:
    """Tensors by name, and what is known of them.

    Only some heads and columns (or channels) are looked at in float64, gradients for a cotangent that is zero
    elsewhere: what they need of each tensor is at ``places``.
    """

    tensors: dict[str, Tensor]
    ours: Callable[[str], Function]  # by implementation
    loop: Function
    places: dict[str, Place]  # and of "out"
    forward_operations: float
    training: bool

    @property
    def operations(self) -> float:
        return self.forward_operations * (1 + BACKWARD if self.training else 1)

    def work(self, settings: Settings) -> Work:
        return Work("operations", self.operations, settings.limits.get("float32"))

    def run(self, function: Function) -> Run:
        """Forward alone, giving (out,), or forward and backward, giving a gradient for each tensor."""
        return partial(self._gradients, function, self.cotangent) if self.training else partial(self._out, function)

    def check(self, function: Function) -> Run:
        """The same for a cotangent that is zero where nobody looks."""
        if not self.training:
            return self.run(function)
        return partial(self._gradients, function, self._seen(self.cotangent))

    @cached_property
    def cotangent(self) -> Tensor:
        return torch.randn((self.tensors["v"] if "v" in self.tensors else self.tensors["x"]).shape)

    def _seen(self, x: Tensor) -> Tensor:
        kept = torch.zeros_like(x)
        kept[self.places["out"]] = x[self.places["out"]]
        return kept

    @torch.no_grad()
    def _out(self, function: Function) -> tuple[Tensor, ...]:
        return (function(**self.tensors),)

    def _gradients(self, function: Function, cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(**self.tensors), list(self.tensors.values()), cotangent)

    @property
    def tolerance(self) -> float:
        return TOLERANCE * (2 if self.training else 1)

    def error(self, results: tuple[Tensor, ...]) -> float:
        """The greatest error of any row of any result, where it is looked at."""
        names = list(self.tensors) if self.training else ["out"]
        worst = [
            worst_row(result[self.places[name]].detach().double(), expected)
            for name, result, expected in zip(names, results, self.truth, strict=True)
        ]
        return float(torch.stack(worst).max())  # of tensors, since it keeps NaN

    @cached_property
    def truth(self) -> tuple[Tensor, ...]:
        """The output, or each gradient, at its places."""
        part = {name: x.detach()[self.places[name]].double() for name, x in self.tensors.items()}
        if not self.training:
            with torch.no_grad():
                return (self.loop(**part),)
        part = {name: x.requires_grad_() for name, x in part.items()}
        return torch.autograd.grad(self.loop(**part), list(part.values()), self.cotangent[self.places["out"]].double())


@dataclass(frozen=True)
class Form:
    """A kind of recurrence: how its state fades, and what else turns it."""

    decay: str  # none, head, token or channel
    delta: bool = False
    low_rank: bool = False

    @property
    def operations(self) -> float:
        """For each number of the state and each token: fading, writing, reading, and turning."""
        return DECAYS[self.decay] + 2 + 2 + 2 * (self.delta + self.low_rank)

    def draw(self, heads: int, length: int, dim: int, training: bool = False) -> Problem:
        """Queries and values from a normal distribution, keys of unit length, decays mostly above 0.9."""
        shape = (1, heads, length)
        gates = {"head": (heads,), "token": shape, "channel": (*shape, dim)}
        tensors = {
            "q": torch.randn(*shape, dim),
            "k": normalize(torch.randn(*shape, dim), dim=-1),
            "v": torch.randn(*shape, dim),
        }
        if self.decay != "none":
            tensors["decay"] = logsigmoid(torch.randn(gates[self.decay]) + 3)
        if self.delta:
            tensors["beta"] = torch.rand(shape)
        if self.low_rank:
            removed = normalize(torch.randn(*shape, dim), dim=-1)
            tensors["a"], tensors["b"] = -removed, removed * torch.rand(*shape, dim)
        return Problem(
            {name: x.requires_grad_(training) for name, x in tensors.items()},
            _recur,
            recur_loop,
            _places_of_heads(tensors, dim),
            self.operations * heads * dim**2 * length,
            training,
        )


def _recur(impl: str) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        if "a" in rest:
            rest["low_rank"] = (rest.pop("a"), rest.pop("b"))
        return recur(q, k, v, **rest, impl=impl).out

    return run


def _places_of_heads(tensors: dict[str, Tensor], dim: int) -> dict[str, Place]:
    """The first and the last head, whole but for the values: columns of a state know nothing of each other."""
    everything, heads = slice(None), slice(None, None, max(1, tensors["q"].shape[1] - 1))
    places: dict[str, Place] = {name: (everything, heads) if x.dim() > 1 else (heads,) for name, x in tensors.items()}
    places["v"] = places["out"] = (everything, heads, everything, _some(dim))
    return places


def selective(channels: int, states: int, length: int, training: bool = False) -> Problem:
    """A selective scan as in Mamba: gated, with a skip connection, softplus and a bias."""
    tokens = (1, length, channels)
    steps = torch.empty(channels).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    tensors = {
        "x": torch.randn(tokens),
        "dt": torch.randn(tokens),
        "A": -torch.arange(1.0, states + 1).expand(channels, -1).contiguous(),
        "B": torch.randn(1, length, states),
        "C": torch.randn(1, length, states),
        "D": torch.randn(channels),
        "z": torch.randn(tokens),
        "dt_bias": steps.expm1().log(),  # softplus of it is the step
    }
    some, everything = _some(channels), slice(None)
    of_channels: Place = (everything, everything, some)
    places: dict[str, Place] = dict.fromkeys(("x", "dt", "z", "out"), of_channels)
    places |= {"A": (some,), "D": (some,), "dt_bias": (some,), "B": (everything,), "C": (everything,)}
    per_number = 10 + 1 + 2 + 2  # the exponential, fading, writing, reading
    return Problem(
        {name: x.requires_grad_(training) for name, x in tensors.items()},
        _scan,
        scan_loop,
        places,
        per_number * channels * states * length,
        training,
    )


def _scan(impl: str) -> Function:
    return lambda **tensors: scan(**tensors, softplus=True, impl=impl).out


def _some(count: int) -> slice:
    """The first and some more, equally far apart."""
    return slice(None, None, max(1, (count - 1) // (COLUMNS - 1)))
