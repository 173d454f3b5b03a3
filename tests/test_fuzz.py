"""The fuzzer: what it finds in the library today, that it notices what is broken, and that it outlives what crashes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from fuzz.__main__ import main, workers_environment
from fuzz.cases import KINDS, load, run_case
from fuzz.draw import PLACES, Draw, lay
from fuzz.judge import Disagreement, Judge
from fuzz.plan import Plan
from fuzz.run import Report, run
from fuzz.table import table
from fuzz.worker import verdict
from tests.support import faulty_kinds as faulty_kinds

import foveate
from foveate import key_padding

FAULTY = [sys.executable, faulty_kinds.__file__]
FAULTS = ("falls", "sleeps", "differs", "raises", "refuses")
CASES = 300
SEED = 7


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_library_agrees_with_its_definitions() -> None:
    plan = Plan(SEED, tuple(name for name in load() if name not in FAULTS), 0, 1, CASES)
    cases = [plan.case(number) for number in plan.numbers()]
    found = [(kind, seed, *verdict(kind, seed)) for kind, seed in cases]
    wrong = [f"{kind}:{seed}  {message}" for kind, seed, outcome, message in found if outcome not in ("", "refused")]
    assert not wrong, "python -m fuzz --one KIND:SEED repeats a case\n" + "\n".join(wrong)
    assert sum(outcome == "" for _, _, outcome, _ in found) > 0.9 * CASES


def outcomes(kind: str, count: int = 40) -> list[str]:
    return [verdict(kind, seed)[0] for seed in range(count)]


def test_a_wrong_scale_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = foveate.attend

    def broken(q, k, v, pattern, *, scale=None, **options):
        return attend(q, k, v, pattern, scale=1.001 * (q.shape[3] ** -0.5 if scale is None else scale), **options)

    monkeypatch.setattr(foveate, "attend", broken)
    assert outcomes("attend").count("disagreements") > 5
    assert outcomes("attend_backward").count("disagreements") > 5


def test_a_forgotten_mask_and_a_forgotten_key_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = foveate.attend
    monkeypatch.setattr(foveate, "attend", lambda q, k, v, pattern, **rest: attend(q, k, v, **rest))
    assert outcomes("attend").count("disagreements") > 10

    def without_last(q, k, v, pattern, **rest):
        kept = torch.arange(k.shape[2]) < k.shape[2] - 1
        return attend(q, k, v, pattern & key_padding(kept.expand(1, -1)), **rest)

    monkeypatch.setattr(foveate, "attend", without_last)
    assert outcomes("decode").count("disagreements") > 10


def test_a_wrong_recurrence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    recur, conv = foveate.recur, foveate.causal_conv
    monkeypatch.setattr(foveate, "recur", lambda *, scale, **rest: recur(scale=1.001 * scale, **rest))
    assert outcomes("recur").count("disagreements") > 5
    monkeypatch.setattr(foveate, "causal_conv", lambda x, weight, **rest: conv(x, weight.roll(1, 1), **rest))
    assert outcomes("conv").count("disagreements") > 5


def test_reading_what_nobody_sees_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = foveate.attend

    def reads_all(q, k, v, pattern, **options):
        return attend(q, k, v, pattern, **options) + 0 * v.sum()

    monkeypatch.setattr(foveate, "attend", reads_all)
    assert outcomes("attend", 100).count("disagreements") > 3


def test_a_process_that_dies_or_hangs_is_named_and_the_run_goes_on() -> None:
    kinds = FAULTS
    plan = Plan(37, kinds, 0, 1, 14)
    said: list[str] = []
    report = run(plan, command=FAULTY, environment=workers_environment(), say=said.append, patience=2.0)
    expected = {kind: [seed for k, seed in map(plan.case, plan.numbers()) if k == kind] for kind in kinds}
    bad = {
        kind: {seed for seed in seeds if faulty_kinds.goes_wrong(Draw(f"{kind}:{seed}"))}
        for kind, seeds in expected.items()
    }
    assert report.cases == 14
    columns = {"falls": "crashes", "sleeps": "hangs", "differs": "disagreements", "raises": "errors"}
    for kind, column in columns.items():
        assert {finding.seed for finding in report.findings if finding.kind == kind} == bad[kind] != set()
        assert report.counts[kind][column] == len(bad[kind])
        assert all(f"{kind}:{seed}" in "".join(said) for seed in bad[kind])
    assert report.counts["refuses"]["refused"] == len(bad["refuses"])
    assert "SIGSEGV" in "".join(said)
    assert json.loads(json.dumps(report.as_json()))["cases"] == 14
    assert table(report).splitlines()[-1].split()[:2] == ["all", "14"]


def test_a_case_is_a_function_of_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    attend = foveate.attend

    def kept(q, k, v, pattern, **options):
        drawn.append((q.clone(), str(pattern)))
        return attend(q, k, v, pattern, **options)

    monkeypatch.setattr(foveate, "attend", kept)
    for _ in range(2):
        torch.rand(3)
        run_case("decode", 5)
    (q, pattern), (again, same) = drawn
    assert torch.equal(q, again) and pattern == same


@pytest.mark.parametrize("kind", sorted(set(PLACES) - {"plain"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_a_view_holds_the_same_numbers(kind: str, dtype: torch.dtype) -> None:
    for seed in range(10):
        draw = Draw(seed)
        x = draw.normal(*(draw.whole(0, 4) for _ in range(draw.whole(1, 4)))).to(dtype)
        view = lay(draw, x, kind)
        assert view.dtype == dtype and torch.equal(view, x)


def test_the_judge_allows_roundings_and_no_more() -> None:
    x = Draw(1).normal(40).float()
    judge = Judge(lambda x: [x.cumsum(0)], [x], torch.float32)
    right = x.double().cumsum(0).float()
    judge(["sums"], [right])
    with pytest.raises(Disagreement, match=r"sums is off by .* worst at \(\d+,\)"):
        judge(["sums"], [right + 1e-3 * torch.eye(40)[7]])
    with pytest.raises(Disagreement, match=r"sums at \(3,\) .* is nan"):
        judge(["sums"], [torch.where(torch.arange(40) == 3, float("nan"), right)])
    with pytest.raises(Disagreement, match="shape"):
        judge(["sums"], [right[1:]])


def test_one_case_and_wrong_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--one", "pool:1"]) == 0
    assert "pool:1 agrees" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="KIND:SEED"):
        main(["--one", "nothing"])
    with pytest.raises(SystemExit, match="no kind is called nothing"):
        main(["--kind", "nothing"])


def test_the_command_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    assert main(["--kind", "pool", "--cases", "30", "--seed", "3", "--json", str(out)]) == 0
    told = json.loads(out.read_text())
    assert told["cases"] == 30 and told["findings"] == [] and told["counts"]["pool"]["cases"] == 30
    assert "--seed 3" in capsys.readouterr().out


def test_kinds_have_shares() -> None:
    assert all(kind.share > 0 for kind in KINDS.values())
    assert Report(1).cases == 0
