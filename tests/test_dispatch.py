"""The dispatcher: what is chosen, what is refused and in which words, what `explain` says, and what users may add."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from foveate.dispatch import Implementation, Operator, explain
from foveate.options import forced_impl


class Call(NamedTuple):
    """Numbers to add up."""

    numbers: tuple[int, ...]


class Spy:
    """An implementation that takes up to so many numbers, and notes what it is asked."""

    def __init__(self, name: str, limit: int, defers_below: int = 0) -> None:
        self.name, self.limit, self.defers_below = name, limit, defers_below
        self.planned: list[Call] = []
        self.ran: list[list[int]] = []

    def refuse(self, call: Call) -> str | None:
        return None if len(call.numbers) <= self.limit else f"it takes {self.limit} numbers, not {len(call.numbers)}"

    def defer(self, call: Call) -> str | None:
        return "so few are done sooner" if len(call.numbers) < self.defers_below else None

    def plan(self, call: Call) -> list[int]:
        self.planned.append(call)
        return sorted(call.numbers)

    def run(self, plan: list[int]) -> tuple[str, int]:
        self.ran.append(plan)
        return self.name, sum(plan)

    @property
    def implementation(self) -> Implementation[Call, list[int], tuple[str, int]]:
        return Implementation(
            self.name, self.refuse, self.plan, self.run, self.defer, lambda plan: {"count": len(plan)}
        )


class Case(NamedTuple):
    """An operator of three implementations, and the function that users call."""

    fast: Spy
    wide: Spy
    reference: Spy
    operator: Operator[Call, tuple[str, int]]
    add: Callable[..., tuple[str, int]]


@pytest.fixture
def case() -> Case:
    spies = Spy("fast", limit=3), Spy("wide", limit=6, defers_below=5), Spy("reference", limit=9)
    operator = Operator(
        "add",
        [spy.implementation for spy in spies],
        describe=lambda call: {"numbers": len(call.numbers)},
        trivial=lambda call: None if call.numbers else ("nobody", 0),
    )

    def add(*numbers: int, impl: str = "auto") -> tuple[str, int]:
        if any(number < 0 for number in numbers):
            raise ValueError("numbers are at least 0")
        return operator(Call(numbers), impl)

    return Case(*spies, operator, add)


@pytest.mark.parametrize(
    ("count", "expected"), [(1, "fast"), (3, "fast"), (4, "reference"), (5, "wide"), (7, "reference")]
)
def test_the_first_that_neither_refuses_nor_defers_runs(case: Case, count: int, expected: str) -> None:
    assert case.add(*range(count)) == (expected, count * (count - 1) // 2)
    for spy in case[:3]:
        assert len(spy.planned) == len(spy.ran) == (spy.name == expected), "planned once, then run, and nobody else"


def test_where_all_that_can_defer_the_first_of_them_runs() -> None:
    spies = [Spy("a", limit=1), Spy("b", limit=4, defers_below=9), Spy("c", limit=4, defers_below=9)]
    operator = Operator("add", [spy.implementation for spy in spies])
    assert operator(Call((1, 2)), "auto") == ("b", 3)
    with pytest.raises(NotImplementedError, match=r"a: it takes 1 numbers, not 5; b: it takes 4 .*; c: it takes 4"):
        operator(Call((1,) * 5), "auto")


def test_one_asked_for_by_name_runs_or_says_why_not(case: Case) -> None:
    assert case.add(1, 2, impl="wide") == ("wide", 3)  # though it would defer
    with pytest.raises(NotImplementedError, match="impl='fast' cannot run this call: it takes 3 numbers, not 4"):
        case.add(1, 2, 3, 4, impl="fast")
    with pytest.raises(ValueError, match="impl is 'auto' or one of fast, wide, reference; got 'fastest'"):
        case.add(1, impl="fastest")
    assert not case.fast.ran and not case.reference.ran


def test_a_forced_one_stands_in_for_auto_alone(case: Case) -> None:
    with forced_impl("reference"):
        assert case.add(1)[0] == "reference"
        assert case.add(1, impl="wide")[0] == "wide"
        assert not case.operator.takes("fast", "auto") and case.operator.takes("fast", "fast")
    with forced_impl("fast"), pytest.raises(NotImplementedError, match="it takes 3 numbers"):
        case.add(*range(5))
    with forced_impl("unknown"), pytest.raises(ValueError, match="got 'unknown'"):
        case.add(1)
    assert case.operator.takes("fast", "auto") and not case.operator.takes("wide", "auto")


def test_nothing_to_compute_reaches_no_implementation(case: Case) -> None:
    assert case.add() == ("nobody", 0)
    assert explain(case.add).plan == {}
    assert not any(spy.planned or spy.ran for spy in case[:3])


@pytest.mark.parametrize("impl", ["auto", "wide", "reference"])
@pytest.mark.parametrize("count", [2, 4, 5])
def test_explain_names_what_runs_and_runs_nothing(case: Case, count: int, impl: str) -> None:
    found = explain(case.add, *range(count), impl=impl)
    assert not any(spy.ran for spy in case[:3])
    assert (found.operator, found.plan, found.call) == ("add", {"count": count}, {"numbers": count})
    assert found.chosen == case.add(*range(count), impl=impl)[0]
    assert [name for name, reason in found.reasons.items() if reason] == ["fast"] * (count > 3)
    assert ("wide" in found.deferred) == (count < 5)


def test_explain_prints_a_line_for_each(case: Case) -> None:
    assert str(explain(case.add, 1, 2, 3, 4)).splitlines() == [
        "add runs on reference",
        "  numbers    4",
        "  fast       no: it takes 3 numbers, not 4",
        "  wide       so few are done sooner",
        "  reference  chosen, count 4",
    ]
    assert "  reference  could run, stands later in the order" in str(explain(case.add, 1))


def test_explain_refuses_what_the_call_refuses(case: Case) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        explain(case.add, -1)
    with pytest.raises(NotImplementedError, match="it takes 3 numbers"):
        explain(case.add, 1, 2, 3, 4, impl="fast")
    with pytest.raises(ValueError, match="got 'fastest'"):
        explain(case.add, 1, impl="fastest")
    with pytest.raises(TypeError, match="an operator, a function with an argument impl"):
        explain(sorted, [1])
    with pytest.raises(TypeError, match="without having chosen"):
        explain(lambda impl: None)  # type: ignore[call-overload]


def test_other_threads_compute_while_one_explains(case: Case) -> None:
    inside, done = threading.Event(), threading.Event()

    def slow(call: Call) -> None:
        inside.set()
        assert done.wait(10)

    case.operator.register(Implementation("slow", slow, lambda call: call, lambda plan: ("slow", 0)))
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(explain(case.add, 1)))
    thread.start()
    assert inside.wait(10)
    assert case.add(1, 2) == ("fast", 3)
    done.set()
    thread.join()
    assert found[0].chosen == "fast"


@pytest.fixture
def mine(case: Case) -> Iterator[Spy]:
    spy = Spy("mine", limit=2)
    case.operator.register(spy.implementation, before="fast")
    yield spy
    case.operator.unregister("mine")
    assert case.operator.names == ("fast", "wide", "reference")
    assert case.add(1)[0] == "fast"


def test_an_added_implementation_is_preferred_where_it_is_put(case: Case, mine: Spy) -> None:
    assert case.operator.names == ("mine", "fast", "wide", "reference")
    assert case.operator.takes("mine", "auto") and not case.operator.takes("fast", "auto")
    assert case.add(1, 2) == ("mine", 3) and len(mine.ran) == 1
    assert case.add(1, 2, 3)[0] == "fast"
    assert explain(case.add, 1, 2).chosen == "mine"
    assert case.add(1, 2, impl="fast") == ("fast", 3)


def test_registering_refuses_in_words(case: Case, mine: Spy) -> None:
    for name in ("wide", "auto"):
        with pytest.raises(ValueError, match=f"an implementation '{name}' already"):
            case.operator.register(Spy(name, 1).implementation)
    with pytest.raises(ValueError, match="no implementation 'quick', but mine, fast"):
        case.operator.register(Spy("other", 1).implementation, before="quick")
    with pytest.raises(ValueError, match="got 'other'"):
        case.operator.unregister("other")
    alone = Operator("alone", [Spy("only", 1).implementation])
    with pytest.raises(ValueError, match="at least one of which stays"):
        alone.unregister("only")
