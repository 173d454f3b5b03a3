"""The benchmark of recurrences on a CPU: it times only what is right, and knows what each form computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import readme_table
from benchmarks.field import Settings
from benchmarks.recur_cpu import main
from benchmarks.recur_cpu_groups import ATTENTION, FORMS, GROUPS, Case, conclude
from benchmarks.recur_cpu_measure import measure
from benchmarks.recur_cpu_problem import Form, Problem, selective
from benchmarks.recur_cpu_rivals import FLA_DELTA, FLA_GLA, FLA_SIMPLE, LOOP, TRANSFORMERS_DELTA, TRANSFORMERS_SCAN
from benchmarks.report import lead, table
from benchmarks.rivals import Rival
from benchmarks.targets import OURS
from benchmarks.titles import RECUR
from rich.console import Console
from torch import Tensor

SETTINGS = Settings("auto", repeats=3, threads=1, limits={"float32": 1e9})
PROBLEMS = {name: partial(form.draw, 3, 41, 7) for name, form in FORMS.items()}
PROBLEMS["scan"] = partial(selective, 19, 5, 41)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict]:
    def go(*groups: str) -> dict:
        out = tmp_path / "figures.json"
        chosen = [word for group in groups for word in ("--case", group)]
        main([*chosen, "--quick", "--repeats", "2", "--threads", "1", "--out", str(out)])
        return json.loads(out.read_text())["groups"]

    return go


def test_a_run_checks_times_and_draws_every_contender(run: Callable[..., dict], tmp_path: Path) -> None:
    groups = run("delta-training", "per-token", "crossover")
    assert list(groups) == ["delta-training", "per-token", "crossover"]
    for group in groups.values():
        assert group["threads"] == 1 and group["machine"]["torch"] == torch.__version__
        for case in group["cases"]:
            assert case["times"].keys() == case["errors"].keys() > {OURS}
            assert all(t["minimum"] <= t["low"] <= t["median"] <= t["high"] for t in case["times"].values())
            assert case["speedups"][OURS] == 1
    assert len(groups["crossover"]["said"]) == 7 and "said" not in groups["per-token"]
    assert all(case["targets"][0]["got"] <= 1 for case in groups["per-token"]["cases"])
    assert (tmp_path / "figures.svg").read_text().startswith("<?xml")


def test_layers_are_timed_with_and_without_foveate(run: Callable[..., dict]) -> None:
    pytest.importorskip("transformers")
    groups = run("layers", "layers-decode")
    for group in groups.values():
        assert [case["name"].partition(",")[0] for case in group["cases"]] == ["Mamba", "Mamba-2", "Qwen3-Next"]
        for case in group["cases"]:
            assert case["times"].keys() == {OURS, "transformers"} and not case["not_timed"]
            assert case["targets"][0]["got"] == pytest.approx(lead(case))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)
def test_the_truth_agrees_with_us_and_notices_small_errors(make: Callable[..., Problem], training: bool) -> None:
    problem = make(training=training)

    def off(factor: float) -> Callable[..., Tensor]:
        first = next(iter(problem.tensors))
        return lambda **tensors: problem.ours("auto")(**tensors | {first: factor * tensors[first]})

    assert problem.error(problem.check(off(1.0))()) < 1e-4
    assert problem.error(problem.check(off(1.02))()) > problem.tolerance


@pytest.mark.parametrize(
    ("rival", "form"),
    [
        (TRANSFORMERS_DELTA, "gated delta rule"),
        (FLA_DELTA, "gated delta rule"),
        (FLA_SIMPLE, "a decay a token"),
        (FLA_GLA, "a decay a channel"),
        (TRANSFORMERS_SCAN, "scan"),
        (LOOP, "low rank"),
    ],
    ids=lambda x: getattr(x, "label", x),
)
def test_rivals_compute_the_same(rival: Rival, form: str) -> None:
    problem = PROBLEMS[form](training=True)
    measured = measure(Case("small", lambda: problem, (rival,)), SETTINGS, print)
    if rival.label in measured["not_timed"]:
        pytest.skip(measured["not_timed"][rival.label])
    assert measured["errors"][rival.label] < problem.tolerance


def test_rivals_that_are_wrong_or_fail_are_named_and_not_timed() -> None:
    def refuses(problem: Problem) -> Any:
        raise RuntimeError("no such thing\nat all")

    wrong = Rival("wrong", lambda problem: lambda q, **rest: torch.zeros_like(q))
    nan = Rival("not a number", lambda problem: lambda q, **rest: q * float("nan"))
    case = Case("small", PROBLEMS["no decay"], (wrong, nan, Rival("broken", refuses), LOOP))
    measured = measure(case, SETTINGS, print)
    assert measured["times"].keys() == {OURS, LOOP.label}
    assert "it is off by 1" in measured["not_timed"]["wrong"]
    assert "it is off by nan" in measured["not_timed"]["not a number"]
    assert measured["not_timed"]["broken"] == "RuntimeError: no such thing"


def test_nothing_is_timed_when_we_are_wrong() -> None:
    problem = PROBLEMS["no decay"]()
    wrong = Problem(
        problem.tensors, lambda impl: lambda q, **rest: q, problem.loop, problem.places, 1.0, training=False
    )
    with pytest.raises(SystemExit, match="off by"):
        measure(Case("small", lambda: wrong, (LOOP,)), SETTINGS, print)


def test_operations_count_what_each_token_does_to_the_state() -> None:
    counted = {name: form.operations for name, form in FORMS.items()}
    assert counted == {
        "no decay": 4,
        "a decay a head": 5,
        "a decay a token": 5,
        "a decay a channel": 5,
        "gated delta rule": 7,
        "low rank": 7,
    }
    assert Form("none").draw(3, 10, 4).operations == 4 * 3 * 4 * 4 * 10
    assert Form("none").draw(3, 10, 4, training=True).operations == 3 * 4 * 3 * 4 * 4 * 10
    assert selective(6, 5, 10).operations == 15 * 6 * 5 * 10


def test_a_crossover_is_the_length_from_which_on_it_stays_faster() -> None:
    def case(form: str, length: int, ratio: float) -> dict[str, Any]:
        return {"name": f"{form}, N {length}", "speedups": {OURS: 1.0, ATTENTION: ratio}}

    cases = [case("scan", length, ratio) for length, ratio in ((256, 1.5), (512, 0.9), (1024, 1.1), (2048, 4.0))]
    cases += [case("low rank", 256, 0.5)]
    scan, low_rank = conclude("crossover", cases)
    assert "from N 1024 on, 4.0x at N 2048" in scan
    assert "at no measured length" in low_rank
    assert conclude("scan", cases) == []


def test_what_is_said_of_a_group_is_shown_below_its_table() -> None:
    console = Console(width=150, file=StringIO())
    console.print(table("A title", {"cases": [], "said": ["one [thing]", "another"]}))
    assert "one [thing]" in console.file.getvalue() and "another" in console.file.getvalue()


def test_headlines_of_the_readme_are_cases_of_the_whole_run() -> None:
    names = {group: {case.name for case in cases(False)} for group, cases in GROUPS.items()}
    wanted = [(group, case) for group, case in readme_table.HEADLINES if group in GROUPS]
    assert len(wanted) > 5
    assert all(case in names[group] for group, case in wanted)


def test_every_group_has_a_title() -> None:
    assert list(RECUR) == list(GROUPS)
