"""The operators behind one dispatcher: who is chosen, that `explain` tells the truth, and who knows whom."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import foveate
from foveate import (
    Grid,
    Packed,
    alibi,
    attend,
    attend_partial,
    causal,
    causal_conv,
    explain,
    linear_scan,
    neighborhood,
    recur,
    scan,
    sinks,
    topk_blocks,
    window,
)
from foveate.attention import ATTEND
from foveate.attention.call import Call
from foveate.attention.key_ranges import KeyRanges
from foveate.attention.partial import Partial
from foveate.attention.ranges import ATTEND_RANGES, attend_ranges
from foveate.attention.stored import STORED, Segment, attend_stored, quantise
from foveate.dispatch import Implementation, Operator
from foveate.lab.trials import CALLS
from foveate.options import forced_impl
from foveate.recurrence import CAUSAL_CONV, LINEAR_SCAN, RECUR, SCAN
from foveate.recurrence.bi_wkv import BI_WKV, bi_wkv
from foveate.recurrence.ssm import EVOLVE, EVOLVE_SHARED, evolve, evolve_shared
from foveate.recurrence.ttt import TTT, ttt_linear

SOURCES = Path(foveate.__file__).parent
Run = Callable[..., Any]


def _x(*shape: int) -> Tensor:
    return torch.randn(shape)


def _complex(*shape: int) -> Tensor:
    return torch.complex(-_x(*shape).abs(), _x(*shape))


def _attend(n: int, **options: Any) -> Run:
    return partial(attend, _x(2, 4, n, 8), _x(2, 2, n, 8), _x(2, 2, n, 8), causal, **options)


def _stored(n: int) -> Run:
    old, new = _x(2, 2, 2, 40, 8), _x(2, 2, 2, n, 8)
    return partial(attend_stored, _x(2, 4, n, 8), [Segment(*map(quantise, old)), Segment(*new)])


def _recur(n: int, **options: Any) -> Run:
    return partial(recur, _x(1, 2, n, 8), _x(1, 2, n, 8), _x(1, 2, n, 8), **options)


def _scan(n: int) -> Run:
    return partial(scan, _x(1, n, 6), _x(1, n, 6), -_x(6, 4).abs(), _x(1, n, 4), _x(1, n, 4), softplus=True)


def _linear_scan(n: int) -> Run:
    return partial(linear_scan, _x(1, n, 6), -_x(1, n, 6).abs())


def _conv(n: int) -> Run:
    return partial(causal_conv, _x(1, n, 6), _x(6, 4))


def _evolve(n: int) -> Run:
    return partial(evolve, _x(1, n, 6), _complex(6, 4), _complex(6, 4), _complex(6, 4))


def _evolve_shared(n: int) -> Run:
    return partial(evolve_shared, _complex(1, n, 4), _complex(4))


def _ttt(n: int) -> Run:
    norm = torch.ones(2, 8), torch.zeros(2, 8)
    return partial(ttt_linear, _x(1, 2, n, 8), _x(1, 2, n, 8), _x(1, 2, n, 8), _x(1, 2, n).abs(), _x(2, 9, 8), norm)


def _bi_wkv(n: int) -> Run:
    return partial(bi_wkv, _x(1, n, 6), _x(1, n, 6), _x(6).abs(), _x(6))


def _attend_ranges(n: int, **options: Any) -> Run:
    seen = KeyRanges.of([((0, 1), (n // 2 + 1, n))])
    return partial(attend_ranges, _x(2, 4, 1, 8), _x(2, 2, n, 8), _x(2, 2, n, 8), seen)


MADE: dict[Operator[Any, Any], Callable[[int], Run]] = {
    ATTEND: _attend,
    ATTEND_RANGES: _attend_ranges,
    STORED: _stored,
    RECUR: _recur,
    SCAN: _scan,
    LINEAR_SCAN: _linear_scan,
    CAUSAL_CONV: _conv,
    EVOLVE: _evolve,
    EVOLVE_SHARED: _evolve_shared,
    TTT: _ttt,
    BI_WKV: _bi_wkv,
}
operators = pytest.mark.parametrize("operator", MADE, ids=lambda operator: operator.name)


@contextmanager
def spied(operator: Operator[Any, Any]) -> Iterator[list[str]]:
    """The names of the implementations that plan, and those that run, in their order."""
    asked: list[str] = []
    before = list(operator._order.values())

    def spy(each: Implementation[Any, Any, Any]) -> Implementation[Any, Any, Any]:
        def plan(call: Any) -> Any:
            asked.append(f"plan {each.name}")
            return each.plan(call)

        def run(plan: Any) -> Any:
            asked.append(f"run {each.name}")
            return each.run(plan)

        return replace(each, plan=plan, run=run)

    operator._set_order(map(spy, before))
    try:
        yield asked
    finally:
        operator._set_order(before)


def test_all_operators_are_known_here_and_to_the_doctor() -> None:
    found = set()
    for package in (foveate.attention, foveate.recurrence):  # type: ignore[attr-defined]
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            values = vars(importlib.import_module(module.name)).values()
            found |= {value for value in values if isinstance(value, Operator)}
    assert found == set(MADE) == set(CALLS)
    assert len({operator.name for operator in found}) == len(found)


@operators
@pytest.mark.parametrize("length", [2, 37])
def test_explain_agrees_with_what_runs(operator: Operator[Any, Any], length: int) -> None:
    run = MADE[operator](length)
    for impl in ("auto", *operator.names):
        with spied(operator) as asked, torch.enable_grad():
            run.args[0].requires_grad_()  # for what is short of checks runs without the dispatcher
            try:
                found = explain(run, impl=impl)
            except NotImplementedError as refused:
                with pytest.raises(NotImplementedError, match="cannot run this call") as again:
                    run(impl=impl)
                assert str(again.value) == str(refused)
                continue
            assert asked == [f"plan {found.chosen}"]
            asked.clear()
            run(impl=impl)
            assert asked == [f"plan {found.chosen}", f"run {found.chosen}"]
            assert found.operator == operator.name and found.reasons[found.chosen] is None
            assert impl in ("auto", found.chosen)


@operators
def test_every_implementation_gives_the_result_of_auto(operator: Operator[Any, Any]) -> None:
    run = MADE[operator](37)
    expected = run()
    for impl in operator.names:
        if explain(run).reasons[impl] is None:
            got = run(impl=impl)
            for a, b in zip(*((x,) if isinstance(x, Tensor) else x[:1] for x in (got, expected)), strict=True):
                assert_close(a, b, atol=2e-4, rtol=2e-4)


@operators
def test_a_name_nobody_has_is_refused_with_those_there_are(operator: Operator[Any, Any]) -> None:
    words = f"impl is 'auto' or one of {', '.join(operator.names)}; got 'fastest'"
    with pytest.raises(ValueError, match=words):
        MADE[operator](5)(impl="fastest")
    with forced_impl("fastest"), pytest.raises(ValueError, match=words):
        MADE[operator](5)()


@operators
def test_forcing_holds_for_every_operator(operator: Operator[Any, Any]) -> None:
    run = MADE[operator](37)
    with forced_impl("reference"), spied(operator) as asked:
        run()
        assert asked == ["plan reference", "run reference"]
        assert explain(run).chosen == "reference"


@operators
def test_what_is_registered_before_all_others_runs(operator: Operator[Any, Any]) -> None:
    """Also one token without gradients, which goes a shorter way where nothing stands before the kernels."""
    for length in (1, 37):
        run, calls = MADE[operator](length), []
        reference = operator._order["reference"]

        def plan(call: Any, reference: Any = reference, calls: list[Any] = calls) -> Any:
            calls.append(call)
            return reference.plan(call)

        mine = Implementation("mine", lambda call: None, plan, reference.run)
        expected = run(impl="reference")
        operator.register(mine, before=operator.first)
        try:
            assert explain(run).chosen == "mine"
            calls.clear()
            got = run()
        finally:
            operator.unregister("mine")
        assert len(calls) == 1
        for a, b in zip(*((x,) if isinstance(x, Tensor) else x[:1] for x in (got, expected)), strict=True):
            assert_close(a, b, rtol=0, atol=0)
        run()
        assert len(calls) == 1


SHORT = {
    RECUR: "chunks",
    SCAN: "chunks",
    LINEAR_SCAN: "chunks",
    CAUSAL_CONV: "chunks",
    EVOLVE: "fft",
    EVOLVE_SHARED: "doubling",
}


@pytest.mark.parametrize(("operator", "parallel"), SHORT.items(), ids=lambda x: getattr(x, "name", x))
def test_few_tokens_are_left_to_the_loop_over_tokens(operator: Operator[Any, Any], parallel: str) -> None:
    """Where no native kernel takes them: none has rules for forward mode."""
    with torch.autograd.forward_ad.dual_level():
        assert explain(MADE[operator](1)).chosen == "reference"
        assert "a loop over 1 tokens is faster" in str(explain(MADE[operator](1)))
        assert explain(MADE[operator](37)).chosen == parallel
        assert explain(MADE[operator](1), impl=parallel).chosen == parallel


def test_recur_says_what_it_plans() -> None:
    q, k, v = _x(3, 4, 130, 8), _x(3, 2, 130, 8), _x(3, 1, 130, 6)
    found = explain(recur, q, k, v, beta=torch.rand(3, 1, 130), chunk=32, impl="chunks")
    assert found.plan == {"chunk": 32, "tokens": 130, "states": 3 * 2, "state_bytes": 3 * 2 * 8 * 6 * 4}
    assert found.call == {"update": "delta rule", "decay": "none"}
    kinds = {"per head": -_x(4).abs(), "per token": -_x(3, 2, 130).abs(), "per channel": -_x(3, 2, 130, 8).abs()}
    for kind, decay in kinds.items():
        assert explain(recur, q, k, v, decay=decay).call["decay"] == kind
    assert explain(recur, q, k, v, low_rank=(_x(3, 2, 130, 8), _x(3, 2, 130, 8))).call["update"] == "low rank"


def test_attend_says_what_it_plans() -> None:
    q, k, v = _x(1, 2, 192, 8), _x(1, 2, 192, 8), _x(1, 2, 192, 8)
    tiles = partial(explain, attend, q, k, v, impl="tiles")
    assert tiles(causal).plan | {"list_bytes": 0, "threads": 0} == {
        "tiles": 6,  # 3 rows of tiles of 64 x 64 pairs: 1 + 2 + 3, of which the last is cut
        "masked": 3,
        "columns": 0,
        "computed": f"{6 * 64**2 / 192**2:.1%}",
        "list_bytes": 0,
        "threads": 0,
    }
    packed = tiles(topk_blocks(8, k=2), layout=Packed([70, 122])).plan
    assert packed["documents"] == 2 and packed["tiles"] > 0
    assert tiles(causal).call == {"pattern": "causal"}
    assert explain(attend, q, k, v, causal, impl="reference").plan == {"pairs": 2 * 192 * 192}
    assert explain(attend, q[:, :, :20], k, v, window(9) & causal, impl="sdpa").plan["mask"] == "1x1x20x192"
    assert explain(attend, q, k, v, causal, impl="sdpa").plan == {"mask": "causal"}
    assert explain(attend_partial, q, k, v).chosen == explain(q, k, v, partial=True).chosen
    assert "lse" not in str(explain(q, k, v).reasons["sdpa"]) and "row sums" in str(explain(q, k, v, partial=True))


def test_native_plans_bands_and_windows() -> None:
    q = _x(1, 1, 49, 8)
    if explain(q, q, q).reasons["native"]:
        pytest.skip("no native kernels here")
    assert explain(attend, q, q, q, window(9) & causal).plan["distances"] == "0 to 9"
    assert explain(attend, q, q, q).plan["distances"] == "any to any"
    q = _x(1, 1, 56 * 56, 8)
    found = explain(attend, q, q, q, neighborhood(7), layout=Grid(56, 56))
    assert found.plan["windows"] == "7x7" and found.plan["grid"] == "56x56"


def test_attend_with_nothing_to_do_is_explained() -> None:
    q, none = _x(1, 2, 5, 8), _x(1, 2, 0, 8)
    assert explain(attend, q, none, none).plan == {}
    assert explain(recur, none, none, none).plan == {}


# ---- who knows whom ---------------------------------------------------------------------------------------------


def _imports(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return {name for name in found if name.startswith("foveate.")}


def _implementations() -> Iterator[tuple[str, dict[str, Path]]]:
    """Each folder of implementations, and the file of each that an operator there names."""
    names = {name for operator in MADE for name in operator.names}
    for folder in sorted(SOURCES.glob("*/**/impl")):
        found = {file.stem: file for file in folder.glob("*.py") if file.stem in names}
        yield ".".join(("foveate", *folder.relative_to(SOURCES).parts)), found


def test_implementations_of_an_operator_do_not_know_one_another() -> None:
    seen = 0
    for package, files in _implementations():
        assert len(files) > 1, f"{package} has no implementations that operators name"
        for name, file in files.items():
            others = {f"{package}.{other}" for other in files if other != name}
            assert not _imports(file) & others, f"{package}.{name} imports another implementation"
            seen += 1
    assert seen >= 5 + 3 + 3 + 3 + 2


def _modules_of(package: str) -> dict[str, set[str]]:
    """What the files of a package import of it."""
    folder = SOURCES.joinpath(*package.split(".")[1:])
    files = {
        ".".join(("foveate", *file.relative_to(SOURCES).with_suffix("").parts)): file for file in folder.rglob("*.py")
    }
    files = {name.removesuffix(".__init__"): file for name, file in files.items()}
    return {name: (_imports(file) & set(files)) - {name} for name, file in files.items()}


@pytest.mark.parametrize("package", ["foveate.attention", "foveate.recurrence"])
def test_no_circles_of_imports(package: str) -> None:
    """Of files; a package imports what it shows, so that its own name counts for nothing here."""
    known = _modules_of(package)
    packages = {name for name in known if (SOURCES.joinpath(*name.split(".")[1:])).is_dir()}
    left = {name: needs - packages for name, needs in known.items() if name not in packages}
    while left:
        free = {name for name, needs in left.items() if not needs & set(left)}
        assert free, f"these import one another: {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


NATIVE, TILES = (SOURCES / "attention" / "impl" / name for name in ("native.py", "tiles.py"))
KERNELS = ("select", "forward", "backward")
CALLED = {
    "bias": lambda q: attend(q, q, q, causal, bias=alibi(torch.ones(2))),
    "gradient": lambda q: attend(q.requires_grad_(), q, q, window(3) & causal | sinks(2)).sum().backward(),
    "documents": lambda q: attend(q, q, q, topk_blocks(8, k=2), layout=Packed([20, 17])),
    "tiles": lambda q: attend(q, q, q, causal, softcap=9.0, impl="tiles"),
}


@pytest.mark.parametrize("call", CALLED)
def test_from_api_to_kernel_seven_files_at_most_and_no_way_back(call: str) -> None:
    """What lies on the stack where pairs are selected and results are made: each file once, and none twice."""
    stacks: list[list[str]] = []

    def files(frame: FrameType | None) -> list[str]:
        found: list[str] = []
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(SOURCES) and (not found or found[-1] != path.name):
                found.append(path.name)
            frame = frame.f_back
        return found[::-1]

    def look(frame: FrameType, event: str, argument: Any) -> None:
        name, file = frame.f_code.co_name, Path(frame.f_code.co_filename)
        if event == "call" and name in KERNELS and file in (NATIVE, TILES):
            stacks.append(files(frame))

    q = _x(1, 2, 37, 8)
    sys.setprofile(look)
    try:
        CALLED[call](q)
    finally:
        sys.setprofile(None)
    assert len(stacks) >= 2 + (call == "gradient")
    for stack in stacks:
        way = stack[stack.index("api.py") :] if "api.py" in stack else stack  # without what only counts
        assert way[0] in ("api.py", "autodiff.py")  # autograd calls by itself on the way back
        assert len(way) == len(set(way)) <= 7, f"the way of the call goes back: {way}"


# ---- an implementation of a user's ------------------------------------------------------------------------------


def test_users_add_implementations_of_attend() -> None:
    """Such as one that knows a processor of theirs: it takes what it can, and leaves the rest as it was."""

    def refuse(call: Call) -> str | None:
        return None if str(call.pattern) == "full" and call.kind == "softmax" else "it has dense softmax only"

    def run(call: Call) -> Partial:
        k, v = (x.repeat_interleave(call.heads // x.shape[1], 1) for x in (call.k, call.v))
        logits = call.scale * call.q @ k.mT
        return Partial(logits.softmax(-1) @ v, logits.logsumexp(-1))

    q, k, v = _x(2, 4, 9, 8), _x(2, 2, 9, 8), _x(2, 1, 9, 8)
    expected = attend(q, k, v, impl="reference"), attend(q, k, v, causal)
    ATTEND.register(Implementation("mine", refuse, lambda call: call, run), before="native")
    try:
        assert explain(q, k, v).chosen == "mine"
        assert_close(attend(q, k, v), expected[0])
        assert_close(attend_partial(q, k, v).lse, (8**-0.5 * q @ k.repeat_interleave(2, 1).mT).logsumexp(-1))
        assert explain(q, k, v, causal).reasons["mine"] == "it has dense softmax only"
        assert_close(attend(q, k, v, causal), expected[1])
        with pytest.raises(NotImplementedError, match="dense softmax only"):
            attend(q, k, v, causal, impl="mine")
    finally:
        ATTEND.unregister("mine")
