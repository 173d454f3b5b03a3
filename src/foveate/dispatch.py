"""One dispatcher for every operator: which implementation runs a call, why the others do not, and what it plans.

The function of an operator (`attend`, `recur`, ...) checks its arguments, puts them into a call of the operator's own
kind, and hands that to its :class:`Operator`, which picks an :class:`Implementation`, lets it plan once, and runs it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, NoReturn, ParamSpec, TypeVar, overload

import torch
from torch import Tensor

from foveate.options import FORCED

if TYPE_CHECKING:
    from foveate.attention.biases import BiasLike
    from foveate.attention.weights import Weights
    from foveate.layouts.kinds import Layout
    from foveate.patterns.algebra import Pattern

C = TypeVar("C")  # a call: the arguments of one operator, checked and completed
P = TypeVar("P")  # a plan: a call with all decided that can be decided before computing
R = TypeVar("R")
A = ParamSpec("A")

Facts = Mapping[str, Any]


def nothing(call: Any) -> None:
    """What an implementation that runs every call has against one."""


def as_it_is(call: C) -> C:
    """The plan of an implementation that leaves nothing to decide."""
    return call


def no_facts(plan: Any) -> Facts:
    return {}


@dataclass(frozen=True)
class Implementation(Generic[C, P, R]):
    """One way to compute an operator.

    ``refuse(call)`` says in words why it cannot run a call; None if it can. ``plan(call)`` decides what can be decided
    before computing, such as the tiles to run; ``run(plan)`` computes. ``defer(call)`` says why ``impl="auto"`` leaves
    a call to a later implementation although this one could run it; ``facts(plan)`` is what `explain` shows of a plan.
    """

    name: str
    refuse: Callable[[C], str | None]
    plan: Callable[[C], P]
    run: Callable[[P], R]
    defer: Callable[[C], str | None] = nothing
    facts: Callable[[P], Facts] = no_facts


@dataclass(frozen=True)
class Explanation:
    """Which implementation runs a call, what it plans, and what the others have against it (None: nothing)."""

    operator: str
    chosen: str
    reasons: Mapping[str, str | None]
    plan: Facts = field(default_factory=dict)
    call: Facts = field(default_factory=dict)
    deferred: Mapping[str, str] = field(default_factory=dict)  # why those that could run leave it to a later one

    def __str__(self) -> str:
        lines = [f"{self.operator} runs on {self.chosen}", *(f"  {_row(*fact)}" for fact in self.call.items())]
        return "\n".join([*lines, *(f"  {_row(name, self._verdict(name))}" for name in self.reasons)])

    __repr__ = __str__

    def _verdict(self, name: str) -> str:
        if name == self.chosen:
            return f"chosen{''.join(f', {key} {value}' for key, value in self.plan.items())}"
        if self.reasons[name] is not None:
            return f"no: {self.reasons[name]}"
        return self.deferred.get(name, "could run, stands later in the order")


def _row(name: str, value: object) -> str:
    return f"{name:<10} {value}"


class _Asked(str):
    """In the place of ``impl``: what would run, rather than run it. It is the name that was asked for, marked.

    An argument and not a switch of the process: other threads go on computing, and plain calls look at nothing more.
    """

    def __new__(cls, impl: str) -> _Asked:
        asked = super().__new__(cls, f"what impl={impl!r} would run")
        asked.impl = impl
        return asked

    impl: str


class _Answer(BaseException):
    """Carries an explanation from the dispatcher, past the operator's function, to `explain`."""

    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


class Operator(Generic[C, R]):
    """What is computed, and the implementations that compute it, in the order of preference.

    ``describe(call)`` is what `explain` shows of a call. ``trivial(call)`` is the result where there is nothing to
    compute, so that no implementation need know of empty inputs; None otherwise.

    >>> double = Operator("double", [Implementation("sum", nothing, plan=float, run=lambda x: x + x)])
    >>> shift = Implementation("shift", lambda x: None if x == int(x) else "it shifts integers", int, lambda x: x << 1)
    >>> double.register(shift, before="sum")
    >>> double(3, "auto"), double(2.5, "auto"), double(3, "sum")
    (6, 5.0, 6.0)
    >>> double(2.5, "shift")
    Traceback (most recent call last):
    NotImplementedError: impl='shift' cannot run this call: it shifts integers
    """

    def __init__(
        self,
        name: str,
        implementations: Iterable[Implementation[C, Any, R]],
        *,
        describe: Callable[[C], Facts] = no_facts,
        trivial: Callable[[C], R | None] = nothing,
    ) -> None:
        self.name, self.describe, self.trivial = name, describe, trivial
        self._order = {each.name: each for each in implementations}
        self.first = next(iter(self._order))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the implementations, in the order of preference."""
        return tuple(self._order)

    def __call__(self, call: C, impl: str) -> R:
        """Choose, plan once, run."""
        chosen = self.choose(call, impl)
        ready = self.trivial(call)
        return chosen.run(chosen.plan(call)) if ready is None else ready

    def choose(self, call: C, impl: str = "auto") -> Implementation[C, Any, R]:
        """The implementation that runs a call: the one asked for by name, else the first that can.

        Raises ValueError for a name it does not know, and NotImplementedError with the reason where the implementation
        asked for, by ``impl`` or by `foveate.options.forced_impl`, cannot run the call.
        """
        if isinstance(impl, _Asked):
            raise _Answer(self._explained(call, impl.impl))
        if impl == "auto":
            impl = FORCED.name or impl
        if impl == "auto":
            return self._fastest(call)
        if impl not in self._order:
            raise ValueError(f"impl is 'auto' or one of {', '.join(self._order)}; got {impl!r}")
        reason = self._order[impl].refuse(call)
        if reason is not None:
            raise NotImplementedError(f"impl={impl!r} cannot run this call: {reason}")
        return self._order[impl]

    def takes(self, name: str, impl: str) -> bool:
        """Whether a call that an implementation can run goes to it without a look at the others.

        The short ways of decoding steps ask this, and nothing else, before they leave out the general checks.
        """
        return ((FORCED.name or self.first) if impl == "auto" else impl) == name and not torch.compiler.is_compiling()

    def refusal(self, name: str, call: C) -> str | None:
        """Why an implementation cannot run a call; None if it can."""
        return self._order[name].refuse(call)

    def register(self, implementation: Implementation[C, Any, R], *, before: str | None = None) -> None:
        """Add an implementation, in the order of preference before the one named, or else last."""
        if implementation.name in (*self._order, "auto"):
            raise ValueError(f"{self.name} has an implementation {implementation.name!r} already")
        if before is not None and before not in self._order:
            raise ValueError(f"{self.name} has no implementation {before!r}, but {', '.join(self._order)}")
        order = list(self._order.values())
        order.insert(len(order) if before is None else self.names.index(before), implementation)
        self._set_order(order)

    def unregister(self, name: str) -> None:
        """Take an implementation out again."""
        if name not in self._order or len(self._order) == 1:
            raise ValueError(f"{self.name} has {', '.join(self._order)}, at least one of which stays; got {name!r}")
        self._set_order([each for each in self._order.values() if each.name != name])

    def _set_order(self, order: Iterable[Implementation[C, Any, R]]) -> None:
        self._order = {each.name: each for each in order}
        self.first = next(iter(self._order))

    def _fastest(self, call: C) -> Implementation[C, Any, R]:
        deferring = None
        for each in self._order.values():
            if each.refuse(call) is None:
                if each.defer(call) is None:
                    return each
                deferring = deferring or each
        return deferring or self._nobody(call)

    def _nobody(self, call: C) -> NoReturn:
        reasons = "; ".join(f"{each.name}: {each.refuse(call)}" for each in self._order.values())
        raise NotImplementedError(f"no implementation of {self.name} can run this call: {reasons}")

    def _explained(self, call: C, impl: str) -> Explanation:
        chosen = self.choose(call, impl)
        reasons = {name: each.refuse(call) for name, each in self._order.items()}
        waiting = {name: each.defer(call) for name, each in self._order.items() if reasons[name] is None}
        deferred = {name: why for name, why in waiting.items() if why is not None}
        plan = {} if self.trivial(call) is not None else chosen.facts(chosen.plan(call))
        return Explanation(self.name, chosen.name, reasons, plan, self.describe(call), deferred)


@overload
def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = ...,
    *,
    bias: BiasLike = None,
    weights: Weights | str = "softmax",
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    dropout: float = 0.0,
    partial: bool = False,
) -> Explanation: ...


@overload
def explain(operator: Callable[A, Any], /, *args: A.args, **options: A.kwargs) -> Explanation: ...


def explain(*args: Any, **options: Any) -> Explanation:
    """Which implementation a call of an operator would run, what it plans, and why no other one would run.

    Nothing is computed but what the choice and the plan need. ``operator`` is any function with an argument ``impl``:
    attend, attend_partial, recur, scan, linear_scan, causal_conv, evolve, ttt_linear, ...; then its own arguments.

    >>> from foveate import attend, explain, recur
    >>> q = k = v = torch.randn(1, 2, 130, 8, dtype=torch.float64)
    >>> print(explain(recur, q, k, v))
    recur runs on chunks
      update     additive
      decay      none
      native     no: it has float32, bfloat16 and float16, not float64
      chunks     chosen, chunk 64, tokens 130, states 2, state_bytes 1024
      reference  could run, stands later in the order

    Without an operator, q, k, v and the options are those of attend (with ``partial``: of attend_partial).

    >>> explain(q, k, v, weights="sigmoid").chosen
    'tiles'

    Raises what the call would raise: ValueError and TypeError on ill-fitting arguments, NotImplementedError where
    ``impl`` names an implementation that cannot run it.
    """
    if not args or isinstance(args[0], Tensor):
        args = (_attend(options), *args)
    operator, *arguments = args
    if not callable(operator) or "impl" not in inspect.signature(operator).parameters:
        raise TypeError(f"explain takes an operator, a function with an argument impl such as recur; got {operator!r}")
    try:
        operator(*arguments, **{**options, "impl": _Asked(options.get("impl", "auto"))})
    except _Answer as answer:
        return answer.explanation
    raise TypeError(f"{operator!r} came back without having chosen an implementation")


def _attend(options: dict[str, Any]) -> Callable[..., Any]:
    from foveate.attention import (  # which import the dispatcher: explain is theirs without a name
        attend,
        attend_partial,
    )

    return attend_partial if options.pop("partial", False) else attend
