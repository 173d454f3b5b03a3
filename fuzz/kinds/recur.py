"""recur and step: against loops that hold one state per query head; gradients; packed, carried and no decay at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import foveate as fv
from foveate.recurrence import step
from fuzz.cases import kind
from fuzz.draw import DTYPES, Draw
from fuzz.judge import Judge, demand
from fuzz.settings import anything

DECAYS = ("none", "head", "token", "channel")
UPDATES = ("additive", "additive", "delta", "low rank", "bonus", "low rank, bonus")


@dataclass
class Rule:
    """All of a call but its tensors: their names, in order, and what is packed."""

    names: tuple[str, ...]
    scale: float
    lengths: list[int] | None = None
    causal: bool = True

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        given = dict(zip(self.names, tensors, strict=True))
        state = given.pop("state", None)
        q, k, v = (given[name] for name in "qkv")
        if not self.causal:
            return self.summed(q, k, v, state)
        lengths = self.lengths or [q.shape[2]]
        outs, states, first = [], [], 0
        for number, length in enumerate(lengths):
            before = state if self.lengths is None or state is None else state[number : number + 1]
            part = {n: x[:, :, first : first + length] if timed(n, x) else x for n, x in given.items()}
            out, after = self.run(part, before, q.shape[0] if self.lengths is None else 1)
            outs.append(out)
            states.append(after)
            first += length
        return [torch.cat(outs, 2), torch.cat(states, 0)]

    def summed(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> list[Tensor]:
        states = lcm(k.shape[1], v.shape[1])
        keys, values = (x.repeat_interleave(states // x.shape[1], 1) for x in (k, v))
        total = keys.mT @ values
        total = total if state is None else total + state
        return [self.scale * q @ total.repeat_interleave(q.shape[1] // states, 1), total]

    def run(self, given: dict[str, Tensor], state: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        q, heads = given["q"], given["q"].shape[1]
        x = {name: one_per_head(name, y, heads) for name, y in given.items()}
        states = self.num_states(given) if state is None else state.shape[1]
        shape = batch, heads, q.shape[3], given["v"].shape[3]
        now = q.new_zeros(shape) if state is None else state.repeat_interleave(heads // states, 1)
        outs = []
        for t in range(q.shape[2]):
            key, value, before = x["k"][:, :, t, :, None], x["v"][:, :, t, None, :], now
            if "decay" in x:
                decay = x["decay"]
                now = decay_at(decay, t).exp() * now
            if "beta" in x:
                value = x["beta"][:, :, t, None, None] * (value - key.mT @ now)
            if "a" in x:
                now = now + x["b"][:, :, t, :, None] @ (x["a"][:, :, t, None, :] @ before)
            now = now + key @ value
            read = now
            if "bonus" in x:
                own = x["bonus"][None, :, :, None] if x["bonus"].dim() == 2 else x["bonus"][:, :, t, :, None]
                read = before + (own * key) @ x["v"][:, :, t, None, :]
            outs.append(self.scale * (q[:, :, t, None, :] @ read))
        out = torch.cat(outs, 2) if outs else q.new_zeros(*q.shape[:3], shape[3])
        return out, now.unflatten(1, (states, -1))[:, :, 0]

    @staticmethod
    def num_states(given: dict[str, Tensor]) -> int:
        gates = (
            given[name].shape[0 if given[name].dim() == 1 else 1] for name in ("decay", "beta", "a") if name in given
        )
        return lcm(given["k"].shape[1], given["v"].shape[1], *gates)


def timed(name: str, x: Tensor) -> bool:
    return x.dim() > (2 if name == "bonus" else 1)


def one_per_head(name: str, x: Tensor, heads: int) -> Tensor:
    axis = 0 if x.dim() == 1 or (name == "bonus" and x.dim() == 2) else 1
    return x.repeat_interleave(heads // x.shape[axis], axis)


def decay_at(decay: Tensor, t: int) -> Tensor:
    """(B or 1, H, D or 1, 1)."""
    if decay.dim() == 1:
        return decay[None, :, None, None]
    return decay[:, :, t, None, None] if decay.dim() == 3 else decay[:, :, t, :, None]


@dataclass
class Problem:
    rule: Rule
    tensors: dict[str, Tensor]  # as the library gets them
    clean: list[Tensor]
    low: torch.dtype
    chunked: bool = False

    def arguments(self) -> dict[str, Any]:
        found: dict[str, Any] = dict(self.tensors)
        if "a" in found:
            found["low_rank"] = found.pop("a"), found.pop("b")
        found["scale"] = self.rule.scale
        return found

    def judge(self) -> Judge:
        return Judge(self.rule, self.clean, self.low, self.sizes, ulps=8)

    def sizes(self, *tensors: Tensor) -> list[Tensor]:
        """With nothing cancelling; where a rule subtracts what it recalls, what it would be without."""
        recalls = {"beta", "a", "b"} & set(self.rule.names)
        skipped = recalls | ({"decay"} if recalls and self.parallel else set())
        if recalls and not self.parallel:
            return [x.abs() + largest(x) for x in self.rule(*tensors)]
        pairs = [(n, x) for n, x in zip(self.rule.names, tensors, strict=True) if n not in skipped]
        rule = replace(self.rule, names=tuple(n for n, _ in pairs))
        out, state = rule(*(x if n == "decay" else x.abs() for n, x in pairs))
        states = Rule.num_states(dict(zip(self.rule.names, tensors, strict=True)))
        return [out, state.repeat_interleave(states // state.shape[1], 1)]

    @property
    def parallel(self) -> bool:
        """Whether chunks are computed at once, whose roundings are of the state's size at any time."""
        return self.chunked or self.low == torch.float64


def largest(x: Tensor) -> Tensor:
    return x.abs().amax() if x.numel() else x.new_zeros(())


def problem(draw: Draw, length: int, *, packs: bool = True) -> Problem:
    dtype, contents = draw.one(DTYPES), draw.one(("normal",) * 8 + ("zeros", "tiny", "sparse"))
    heads, batch = draw.one((1, 2, 2, 4, 6)), draw.batch()
    dim, value_dim = draw.dim(130 if length < 20 else 33), draw.dim(130 if length < 20 else 33)
    update, decay = draw.one(UPDATES), draw.one(DECAYS)
    lengths = None
    if packs and draw.chance(0.2):
        batch, lengths = 1, draw.split(length)
    num_k, num_v, num_gates = draw.divisor(heads), draw.divisor(heads), draw.divisor(heads)
    tensors = {
        "q": draw.tensor(batch, heads, length, dim, dtype=torch.float64, contents=contents),
        "k": normalize(draw.tensor(batch, num_k, length, dim, dtype=torch.float64), dim=-1),
        "v": draw.tensor(batch, num_v, length, value_dim, dtype=torch.float64, contents=contents),
    }
    causal = not (update == "additive" and decay == "none" and lengths is None and draw.chance(0.5))
    tensors |= gates(draw, tensors, decay, update, num_gates)
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    if draw.chance(0.2) and dtype != torch.float64:  # gates are often kept in float32
        tensors |= {name: x.float() for name, x in tensors.items() if name in ("decay", "beta")}
    low = torch.promote_types(dtype, torch.float32)
    states = Rule.num_states(tensors)
    if draw.chance(0.4):
        tensors["state"] = draw.tensor(len(lengths) if lengths else batch, states, dim, value_dim, dtype=low)
    rule = Rule(tuple(tensors), dim**-0.5 if draw.chance(0.7) else 0.7, lengths, causal)
    return Problem(rule, {name: draw.placed(x) for name, x in tensors.items()}, list(tensors.values()), low)


def gates(draw: Draw, tensors: dict[str, Tensor], decay: str, update: str, heads: int) -> dict[str, Tensor]:
    (batch, num_q, length, dim), found = tensors["q"].shape, {}
    shape = (batch, heads, length)
    if decay != "none":
        sizes = {"head": (heads,), "token": shape, "channel": (*shape, dim)}[decay]
        x = -draw.one((0.1, 1.0, 5.0)) * draw.uniform(*sizes)
        if draw.chance(0.2):
            x = x.masked_fill(draw.bits(0.2, *sizes), draw.one((0.0, -100.0, float("-inf"))))
        found["decay"] = x
    if update == "delta":
        found["beta"] = (
            2 * draw.uniform(*shape) if draw.chance(0.8) else draw.one((0.0, 1.0)) + torch.zeros(shape).double()
        )
    if "low rank" in update:
        found["a"] = -normalize(draw.normal(*shape, dim), dim=-1)
        found["b"] = -found["a"] * draw.uniform(*shape, dim)
    if "bonus" in update:
        found["bonus"] = draw.normal(num_q, dim) if draw.chance(0.5) else draw.normal(batch, num_q, length, dim)
    return found


def length_of(draw: Draw) -> int:
    return draw.length(draw.one((9,) * 16 + (33,) * 3 + (130,)))


@kind("recur", 8)
def forward(draw: Draw) -> None:
    found = problem(draw, length_of(draw))
    options: dict[str, Any] = {}
    if draw.chance(0.1):
        options, found.chunked = {"impl": "chunks", "chunk": draw.one((1, 2, 4, 16, 64))}, True
    with torch.no_grad(), anything(draw):
        out, state = fv.recur(**found.arguments(), lengths=found.rule.lengths, causal=found.rule.causal, **options)
    checked(found, out, state)
    found.judge()(["out", "state"], [out, state])


def checked(found: Problem, out: Tensor, state: Tensor) -> None:
    demand(out.dtype == found.tensors["v"].dtype, f"out is {out.dtype}, v {found.tensors['v'].dtype}")
    demand(state.dtype == found.low, f"the state is {state.dtype}, not {found.low}")


@kind("step", 8)
def stepped(draw: Draw) -> None:
    """Token by token, each call with the state of the last."""
    found = problem(draw, draw.whole(1, 4), packs=False)
    given, state = found.arguments(), found.tensors.get("state")
    given.pop("state", None)
    if not found.rule.causal:
        found.rule.causal = True
    outs = []
    with torch.no_grad(), anything(draw):
        for t in range(given["q"].shape[2]):
            token = {name: cut(name, x, t) for name, x in given.items()}
            out, state = step(**token, state=state)
            outs.append(out)
    assert state is not None
    checked(found, outs[0], state)
    found.judge()(["out", "state"], [torch.cat(outs, 2), state])


def cut(name: str, x: Any, t: int) -> Any:
    if isinstance(x, tuple):
        return tuple(cut(name, y, t) for y in x)
    return x[:, :, t : t + 1] if isinstance(x, Tensor) and timed(name, x) else x


def connected(results: Sequence[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Results without tokens, of which some do not depend on the leaves, as parts of the graph."""
    if any(x.numel() == 0 for x in leaves):
        return [x + 0 * sum(leaf.sum() for leaf in leaves if not leaf.numel()) for x in results]
    return list(results)


@kind("recur_backward", 3)
def backward(draw: Draw) -> None:
    found = problem(draw, draw.length(draw.one((5,) * 16 + (17,) * 3 + (70,))))
    leaves = {name: x.detach().requires_grad_() for name, x in found.tensors.items()}
    found.tensors = leaves
    with anything(draw):
        results = fv.recur(**found.arguments(), lengths=found.rule.lengths, causal=found.rule.causal)
        demand(results.out.requires_grad, "the gradient stops at out")
        results = connected(results, list(leaves.values()))
        towards = [draw.tensor(*x.shape, dtype=x.dtype) for x in results]
        placed = [draw.placed(x) for x in towards]
        grads = torch.autograd.grad(results, list(leaves.values()), placed, allow_unused=True, materialize_grads=True)
    count = len(leaves)

    def gradients(*tensors: Tensor) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in tensors[:count]]
        outs = connected(found.rule(*inputs), inputs)
        return list(torch.autograd.grad(outs, inputs, tensors[count:], allow_unused=True, materialize_grads=True))

    def sizes(*tensors: Tensor) -> list[Tensor]:
        """Also those of half the beta: where a key of length 1 erases all of the state, terms cancel exactly."""
        erased = [x / 2 if n == "beta" else x for n, x in zip(found.rule.names, tensors, strict=False)]
        both = magnitudes(*tensors), magnitudes(*erased, *tensors[count:])
        return [torch.maximum(one, other) for one, other in zip(*both, strict=True)]

    def magnitudes(*tensors: Tensor) -> list[Tensor]:
        signs = (x if n == "decay" else x.abs() for n, x in zip(found.rule.names, tensors, strict=False))
        plain = Rule(found.rule.names, found.rule.scale, found.rule.lengths, found.rule.causal)
        given = [*signs, *(x.abs() for x in tensors[count:])]
        inputs = [x.detach().requires_grad_() for x in given[:count]]
        outs = connected(plain(*inputs), inputs)
        found_grads = torch.autograd.grad(outs, inputs, given[count:], allow_unused=True, materialize_grads=True)
        return [x.abs() for x in found_grads]

    judge = Judge(gradients, [*found.clean, *towards], found.low, sizes, ulps=16)
    judge([f"gradient of {name}" for name in leaves], grads)
