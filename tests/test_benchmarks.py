"""The benchmark of attention on a CPU: it times only what is right, keeps what it measured, and judges fairly."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks import decode_mixers, readme_table
from benchmarks.attend_cpu import main
from benchmarks.attend_cpu_groups import Case, shifted
from benchmarks.attend_cpu_measure import measure
from benchmarks.attend_cpu_problem import Problem, drawn
from benchmarks.attend_cpu_rivals import SDPA_MASK
from benchmarks.attend_cpu_truth import Truth
from benchmarks.field import Settings
from benchmarks.report import lead
from benchmarks.rivals import Rival
from benchmarks.targets import OURS, YARDSTICK, Faster, Flat, InProportion, Measured, OfLimit
from torch import Tensor

from foveate import causal, neighborhood, window
from foveate.attention import attend
from foveate.kernels.cpu.loader import library
from foveate.patterns import Grid, random_blocks

IMPL = "tiles" if library() is None else "native"
SETTINGS = Settings(IMPL, repeats=3, threads=1, limits={"float32": 1e9})


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict]:
    def go(*groups: str) -> dict:
        out = tmp_path / "figures.json"
        chosen = [word for group in groups for word in ("--case", group)]
        main([*chosen, "--quick", "--impl", IMPL, "--repeats", "3", "--threads", "1", "--out", str(out)])
        return json.loads(out.read_text())["groups"]

    return go


def test_a_run_checks_times_and_draws_every_contender(run: Callable[..., dict], tmp_path: Path) -> None:
    groups = run("decode", "swin-training")
    assert list(groups) == ["decode", "swin-training"]
    for group in groups.values():
        assert group["threads"] == 1 and group["impl"] == IMPL and group["machine"]["torch"] == torch.__version__
        for case in group["cases"]:
            assert not case["not_timed"] and case["times"].keys() == case["errors"].keys() > {OURS}
            assert all(t["minimum"] <= t["low"] <= t["median"] <= t["high"] for t in case["times"].values())
            assert case["speedups"][OURS] == 1 and all(target["got"] > 0 for target in case["targets"])
    drawn_page = (tmp_path / "figures.svg").read_text()
    assert drawn_page.startswith("<?xml") and len(drawn_page) > 10_000


def test_a_partial_run_leaves_other_groups_as_they_were(run: Callable[..., dict]) -> None:
    before = run("decode")
    after = run("swin")
    assert after["decode"] == before["decode"] and set(after) == {"decode", "swin"}


def test_the_readme_shows_the_headlines_that_were_measured(run: Callable[..., dict]) -> None:
    groups = run("decode")
    (case,) = groups["decode"]["cases"]
    case["name"] = dict(readme_table.HEADLINES)["decode"]
    page = readme_table._of_groups(groups)
    assert f"{lead(case):.1f}x" in page and page.count("\n| ") == 3


def test_decoding_steps_are_checked_and_timed_beside_dense_ones(tmp_path: Path) -> None:
    sizes = {"length": 150, "dim": 32, "heads": 4, "repeats": 3, "threads": 1}
    given = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    out = tmp_path / "decode.json"
    for row in ("moba", "delta_attention", "nsa"):
        decode_mixers.main([*given, "--row", row, "--out", str(out)])
    steps = json.loads(out.read_text())["steps"]
    assert set(steps) == {"moba", "delta_attention", "nsa"}
    assert all(step["error"] < 1e-3 and step["ratio"] > 0 and step["settings"] == sizes for step in steps.values())


def small_case(*rivals: Rival) -> Case:
    return Case("small", torch.float32, partial(drawn, (1, 2, 50, 8), torch.float32, causal), rivals, ())


def nan_in_a_row(problem: Problem) -> Callable[..., Tensor]:
    return lambda q, k, v: problem.ours("reference")(q, k, v).index_fill(2, torch.tensor([49]), float("nan"))


def zeros(problem: Problem) -> Callable[..., Tensor]:
    return lambda q, k, v: torch.zeros_like(q)


def refuses(problem: Problem) -> Callable[..., Tensor]:
    raise RuntimeError("no compiler\nat all")


def test_a_rival_that_is_wrong_or_fails_is_named_and_not_timed() -> None:
    rivals = Rival("wrong", zeros), Rival("not a number", nan_in_a_row), Rival("broken", refuses), SDPA_MASK
    measured = measure(small_case(*rivals), SETTINGS, print)
    assert set(measured["times"]) == {OURS, SDPA_MASK.label}
    assert "it is off by 1" in measured["not_timed"]["wrong"]
    assert "it is off by nan" in measured["not_timed"]["not a number"]
    assert measured["not_timed"]["broken"] == "RuntimeError: no compiler"


def test_nothing_is_timed_when_we_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Problem, "ours", lambda problem, impl: zeros(problem))
    with pytest.raises(SystemExit, match="off by"):
        measure(small_case(SDPA_MASK), SETTINGS, print)


PROBLEMS = {
    "causal": partial(drawn, (1, 3, 70, 8), torch.float32, causal),
    "window": partial(drawn, (2, 3, 70, 8), torch.float32, window(9) & causal),
    "blocks": partial(drawn, (1, 2, 130, 8), torch.float32, random_blocks(64, 0.7, seed=3)),
    "queries that see nothing": partial(drawn, (1, 2, 64, 8), torch.float32, random_blocks(8, 0.2, seed=1)),
    "grid": partial(drawn, (1, 2, 35, 8), torch.float32, neighborhood(3), layout=Grid(5, 7)),
    "swin": partial(drawn, (8, 2, 9, 8), torch.float32, shifted(8, 2, 3), window=(3, 3)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)
def test_the_truth_agrees_with_the_definition_and_with_nothing_else(
    make: Callable[..., Problem], training: bool
) -> None:
    problem = make(training=training)
    truth = Truth(problem)

    def scaled(factor: float) -> Callable[..., Tensor]:
        return lambda q, *rest: problem.ours("reference")(factor * q, *rest)

    assert truth.error(problem.run(scaled(1.0))()) < 1e-5
    assert truth.error(problem.run(scaled(0.98))()) > truth.tolerance


def test_the_truth_notices_one_key_too_many_in_bfloat16() -> None:
    problem = drawn((1, 1, 600, 64), torch.bfloat16, window(63) & causal)
    wider = problem.run(lambda q, k, v: attend(q, k, v, window(64) & causal, impl="reference"))
    truth = Truth(problem)
    assert truth.error(problem.run(problem.ours("reference"))()) < truth.tolerance < truth.error(wider())


def test_the_truth_knows_which_head_of_keys_a_query_reads() -> None:
    problem = drawn((1, 4, 1, 8), torch.float32, keys=(2, 40))
    assert Truth(problem).error(problem.run(problem.ours("reference"))()) < 1e-5


def test_operations_count_visible_pairs() -> None:
    problem = drawn((2, 3, 64, 8), torch.float32, causal)
    assert problem.pairs == 2 * 3 * 64 * 65 // 2
    assert problem.operations == 4 * 8 * problem.pairs
    assert drawn((2, 3, 64, 8), torch.float32, causal, training=True).operations == 3.5 * problem.operations


def test_targets_are_judged_against_the_best_of_their_rivals() -> None:
    seconds = {OURS: 1.0, YARDSTICK: 4.0, "SDPA": 3.0, "SDPA, packed": 2.0, "eager": 1.5}
    measured = Measured(seconds, of_limit=0.5, of_yardstick=0.25)
    assert Faster(2.0, "SDPA").judge(measured).got == 2.0
    assert Faster(2.0, "SDPA").judge(measured).reached
    assert Faster(2.0, "SDPA, packed").judge(measured).got == 2.0
    assert not Faster(2.0, "SDPA", "eager").judge(measured).reached
    assert Faster(2.0, "flex").judge(measured).reached is None
    assert OfLimit(0.4).judge(measured).reached and not OfLimit(0.6).judge(measured).reached
    assert not Flat(0.3, {OURS: 1, "SDPA": 2}).judge(measured).reached  # 1 and 1.5 seconds a token
    assert Flat(0.6, {OURS: 1, "SDPA": 2}).judge(measured).got == pytest.approx(1 / 1.5)
    assert InProportion(1.1, 0.1).judge(measured).got == pytest.approx(1.2)
