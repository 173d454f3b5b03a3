"""Synthetic tasks: what they ask, that mixers learn it, and that what was learned is kept."""

from __future__ import annotations

import itertools
import json
import os
import signal
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from foveate.catalogue.registry import row
from foveate.cli import app
from foveate.lab.tasks.compare import compare_task, table, usual
from foveate.lab.tasks.kinds import NOTHING, Copy, Recall, State, Task, make_task, permutations
from foveate.lab.tasks.model import TaskModel, make_mixer
from foveate.lab.tasks.plot import draw
from foveate.lab.tasks.rates import still_to_try
from foveate.lab.tasks.run import Point, TaskRecipe, TaskRun
from foveate.lab.tasks.teach import train_task

SMALL = Recall(length=13, pairs=2, vocab=11)
BRIEF = TaskRecipe(dim=16, heads=2, batch=4, steps=45)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- what is asked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [Recall(length=37, pairs=5, vocab=23), Recall(length=8, pairs=2, vocab=4)])
def test_recall_asks_for_the_value_that_followed_the_key(task: Recall, seed: int) -> None:
    tokens, answers = task.batch(50, generator(seed))
    assert tokens.shape == answers.shape == (50, task.length)
    assert int(tokens.min()) >= 0 and int(tokens.max()) < task.vocab
    for line, wanted in zip(tokens.tolist(), answers.tolist(), strict=True):
        told = dict(zip(line[0 : 2 * task.pairs : 2], line[1 : 2 * task.pairs : 2], strict=True))
        assert len(told) == len(set(told.values())) == task.pairs
        assert max(told) < task.vocab // 2 <= min(told.values())
        asked = {line[at]: answer for at, answer in enumerate(wanted) if answer != NOTHING}
        assert asked == told
        assert not set(told) & {line[at] for at in range(2 * task.pairs, task.length) if wanted[at] == NOTHING}


def test_recall_asks_early_by_a_power_law(seed: int) -> None:
    """With one pair, the chance of slot j is j ** (power - 1) up to a factor."""
    task = Recall(length=2 + 2 * 30, pairs=1, vocab=8, power=0.25)
    _, answers = task.batch(20_000, generator(seed))
    slots = (answers != NOTHING).float().argmax(1).sub(2) // 2
    seen = torch.bincount(slots, minlength=30) / 20_000
    chance = torch.arange(1.0, 31.0) ** (task.power - 1)
    chance = chance / chance.sum()
    assert ((seen - chance).abs() < 5 * (chance / 20_000).sqrt() + 1e-4).all()


@pytest.mark.parametrize("length", [2, 9, 12])
def test_copy_asks_for_the_same_tokens_again(length: int, seed: int) -> None:
    tokens, answers = Copy(length=length, vocab=7).batch(30, generator(seed))
    half = length // 2
    assert (tokens[:, half] == 7).all()
    assert torch.equal(answers[:, half : 2 * half], tokens[:, :half])
    assert (answers[:, :half] == NOTHING).all()
    assert torch.equal(tokens[:, half + 1 :], answers[:, half : length - 1])


def test_parity_counts_ones(seed: int) -> None:
    tokens, answers = State(length=33, group="parity").batch(9, generator(seed))
    assert torch.equal(answers, tokens.cumsum(1) % 2)


def test_s5_multiplies_permutations(seed: int) -> None:
    every = list(itertools.permutations(range(5)))
    tokens, answers = State(length=11, group="s5").batch(6, generator(seed))
    for line, wanted in zip(tokens.tolist(), answers.tolist(), strict=True):
        arranged = tuple(range(5))
        for token, answer in zip(line, wanted, strict=True):
            arranged = tuple(every[token][place] for place in arranged)
            assert every[answer] == arranged


def test_s5_is_a_group_that_does_not_commute() -> None:
    product = permutations()
    assert (product.sort(0).values == torch.arange(120)[:, None]).all()
    assert (product.sort(1).values == torch.arange(120)).all()
    assert not torch.equal(product, product.T)
    a, b, c = torch.randint(120, (3, 500))
    assert torch.equal(product[product[a, b], c], product[a, product[b, c]])


@pytest.mark.parametrize("task", [Recall(), Copy(), State(), State(group="s5")])
def test_examples_depend_on_the_seed_alone(task: Task, seed: int) -> None:
    first, again, other = (task.batch(3, generator(each)) for each in (seed, seed, seed + 1))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.answers, again.answers)
    assert not torch.equal(first.tokens, other.tokens)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("recal", {}, "there are recall, copy, state"),
        ("copy", {"pairs": 3}, "has no pairs"),
        ("state", {"group": "s4"}, "parity, s5"),
        ("recall", {"length": 63, "pairs": 16}, "a length of 64 or more"),
        ("recall", {"vocab": 16}, "more than vocab=16"),
        ("copy", {"length": 1}, "2 words or more"),
        ("state", {"length": 0}, "1 or more"),
    ],
)
def test_a_task_that_cannot_be_is_refused(name: str, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_task(name, **options)


# ---- the model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["flash_attention", "gated_deltanet(conv=0)", "linear_transformer"])
def test_answers_do_not_depend_on_later_tokens(mixer: str) -> None:
    model = TaskModel(mixer, vocabulary=9, dim=16, heads=2, layers=2)
    tokens = torch.randint(9, (2, 31))
    changed = torch.cat([tokens[:, :20], torch.randint(9, (2, 11))], 1)
    torch.testing.assert_close(model(tokens)[:, :20], model(changed)[:, :20], atol=1e-5, rtol=1e-5)


def test_the_loss_and_the_accuracy_are_those_of_the_answers_asked(seed: int) -> None:
    model = TaskModel("linear_transformer", vocabulary=11, dim=16, heads=2, layers=1)
    batch = SMALL.batch(7, generator(seed))
    loss, accuracy = model.judge(batch)
    logits = model(batch.tokens)
    rows, places = (batch.answers != NOTHING).nonzero(as_tuple=True)
    answers = batch.answers[rows, places]
    torch.testing.assert_close(loss, -logits.log_softmax(-1)[rows, places, answers].mean())
    assert float(accuracy) == pytest.approx(float((logits[rows, places].argmax(-1) == answers).double().mean()))


def test_state_bytes_are_those_of_all_the_mixers() -> None:
    one = make_mixer("flash_attention", 16, 2).state_bytes(100)
    model = TaskModel("flash_attention", vocabulary=9, dim=16, heads=2, layers=3)
    assert model.state_bytes(100) == 3 * one == 3 * 2 * 100 * 16 * 4


@pytest.mark.parametrize(
    ("mixer", "complaint"),
    [
        ("agent_attention", "would see the answers"),
        ("flash_atention", "did you mean flash_attention"),
        ("flash_attention(colour=1)", "colour"),
        ("window(8) & causal", "name of a mechanism"),
    ],
)
def test_what_is_no_causal_mixer_is_refused(mixer: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        train_task(SMALL, mixer, tmp_path, BRIEF, progress=False)
    with pytest.raises(ValueError, match=complaint):
        compare_task(SMALL, ["linear_transformer", mixer], out=tmp_path, recipe=BRIEF, progress=False)
    assert not list(tmp_path.iterdir())


# ---- learning ----------------------------------------------------------------------------------------------


def test_exact_attention_learns_to_recall(seed: int) -> None:
    run = TaskRun(Recall(length=32, pairs=4, vocab=32), "flash_attention", TaskRecipe(steps=600, seed=seed))
    assert all(0 <= point.accuracy <= 1 for point in run.points())
    assert run.accuracy() > 0.9
    assert run.solved and run.step < 600
    assert [point.length for point in run.curve] == sorted(point.length for point in run.curve)


def test_the_delta_rule_learns_to_recall(seed: int) -> None:
    recipe = TaskRecipe(dim=32, layers=1, steps=400, lr=6e-3, seed=seed)
    run = TaskRun(Recall(length=12, pairs=2, vocab=12), "deltanet", recipe)
    for _ in run.points():
        pass
    assert run.accuracy() > 0.9


def test_parity_is_learned_by_a_transition_with_negative_eigenvalues(seed: int) -> None:
    """From most first weights, that is: three in a row that fail are no accident."""
    for first_weights in range(3):
        recipe = TaskRecipe(dim=32, layers=1, steps=600, seed=seed + first_weights)
        run = TaskRun(State(length=16, group="parity"), "deltanet(negative=True)", recipe)
        for _ in run.points():
            pass
        if run.accuracy() > 0.95:
            return
    pytest.fail("parity was not learned from any of three first weights")


def test_nothing_is_learned_from_answers_that_cannot_be_known() -> None:
    """Chance level of the judge: an untrained model knows one in a vocabulary, not more."""
    run = TaskRun(Recall(length=32, pairs=4, vocab=32), "flash_attention", TaskRecipe())
    assert run.accuracy() < 0.2


def test_judging_uses_examples_that_training_never_sees() -> None:
    run = TaskRun(SMALL, "linear_transformer", BRIEF)
    trained = [run.batch(SMALL, step).tokens for step in range(40)]
    judged = [run.batch(SMALL, number, held_out=True).tokens for number in range(40)]
    assert not any(torch.equal(one, other) for one in trained for other in judged)


def test_a_stage_ends_when_it_is_learned_or_when_its_time_is_up() -> None:
    run = TaskRun(Recall(length=32, pairs=4, vocab=32), "linear_transformer", replace(BRIEF, share=0.2))
    assert [stage.length for stage in run.stages] == [4, 8, 16, 32]
    run.running = 0.96
    run._advance(0.05)
    assert (run.stage, run.running) == (1, 0.0)
    run._advance(0.24)
    assert run.stage == 1
    run._advance(0.25)
    assert run.stage == 2


def test_a_recipe_that_cannot_be_is_refused() -> None:
    for change in ({"minutes": 0.0}, {"dim": 0}, {"seed": -1}, {"steps": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            replace(TaskRecipe(), **change)


# ---- kept, resumed, compared -------------------------------------------------------------------------------


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usual_points = TaskRun.points

    def points(run: TaskRun) -> Iterator[Point]:
        for point in usual_points(run):
            if run.step == steps:
                os.kill(os.getpid(), signal.SIGTERM)
            yield point

    monkeypatch.setattr(TaskRun, "points", points)


def test_a_stopped_and_resumed_run_is_as_if_it_had_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_task(SMALL, "gated_deltanet", tmp_path / "whole", BRIEF, progress=False)
    with monkeypatch.context() as patch:
        stop_after(20, patch)
        assert train_task(SMALL, "gated_deltanet", tmp_path / "cut", BRIEF, progress=False) is None
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    resumed = train_task(SMALL, "gated_deltanet", tmp_path / "cut", BRIEF, progress=False)
    assert whole is not None and resumed is not None
    assert resumed["accuracy"] == whole["accuracy"]
    without_time = [[{**point, "seconds": 0} for point in result["curve"]] for result in (whole, resumed)]
    assert without_time[0] == without_time[1] and len(without_time[0]) == 4
    assert sorted(file.name for file in (tmp_path / "cut").iterdir()) == ["curve.svg", "result.json", "settings.json"]


def test_a_finished_run_is_not_trained_again_unless_asked(tmp_path: Path) -> None:
    first = train_task(SMALL, "linear_transformer", tmp_path, BRIEF, progress=False)
    assert first == train_task(SMALL, "linear_transformer", tmp_path, BRIEF, progress=False)
    with pytest.raises(ValueError, match="another recipe"):
        train_task(SMALL, "linear_transformer", tmp_path, replace(BRIEF, seed=1), progress=False)
    anew = train_task(SMALL, "linear_transformer", tmp_path, replace(BRIEF, seed=1), resume=False, progress=False)
    assert anew is not None and anew["recipe"]["seed"] == 1


def test_compare_keeps_each_mixer_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["linear_transformer", "flash_attention"]
    whole = compare_task(SMALL, names, out=tmp_path / "whole", recipe=BRIEF, progress=False)
    with monkeypatch.context() as patch:
        stop_after(30, patch)
        cut = compare_task(SMALL, names[:1], out=tmp_path / "cut", recipe=BRIEF, progress=False)
    assert cut["interrupted"] and not cut["results"]
    resumed = compare_task(SMALL, names, out=tmp_path / "cut", recipe=BRIEF, resume=True, progress=False)
    assert [result["mixer"] for result in resumed["results"]] == names and not resumed["interrupted"]
    figures = [[(r["accuracy"], r["state_bytes"], r["steps"]) for r in found["results"]] for found in (whole, resumed)]
    assert figures[0] == figures[1]
    assert json.loads((tmp_path / "cut" / "recall.json").read_text(encoding="utf-8")) == resumed
    one_more = compare_task(SMALL, ["gla"], out=tmp_path / "cut", recipe=BRIEF, resume=True, progress=False)
    assert "-m linear_transformer -m flash_attention -m gla --length 13" in one_more["command"]
    assert sorted(file.name for file in (tmp_path / "cut").iterdir()) == ["recall.json", "recall.svg"]
    with pytest.raises(ValueError, match="another task"):
        compare_task(replace(SMALL, pairs=3), names, out=tmp_path / "cut", recipe=BRIEF, resume=True, progress=False)


def test_of_several_rates_the_best_counts_and_every_run_is_kept(tmp_path: Path) -> None:
    one_by_one = [
        compare_task(SMALL, ["gla"], out=tmp_path / str(lr), recipe=replace(BRIEF, lr=lr), progress=False)["results"][0]
        for lr in (1e-4, 3e-2)
    ]
    names, rates = ["gla", "linear_transformer"], [1e-4, 3e-2]
    found = compare_task(SMALL, names, out=tmp_path, recipe=BRIEF, rates=rates, progress=False)
    assert [result["mixer"] for result in found["results"]] == names and "--lr 0.0001,0.03" in found["command"]
    for result in found["results"]:
        runs = [result, *result["other_rates"]]
        assert sorted(run["lr"] for run in runs) == rates
        assert result["accuracy"] == max(run["accuracy"] for run in runs)
    best = found["results"][0]
    assert f"gla at {best['lr']:g}" in (tmp_path / "recall.svg").read_text(encoding="utf-8")
    accuracies = {run["lr"]: run["accuracy"] for run in [best, *best["other_rates"]]}
    assert accuracies == {run["lr"]: run["accuracy"] for run in one_by_one}


def test_resume_adds_a_rate_also_to_a_file_that_knew_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, rates = ["gla", "linear_transformer"], [3e-3, 1e-2]
    whole = compare_task(SMALL, names, out=tmp_path / "whole", recipe=BRIEF, rates=rates, progress=False)
    first = compare_task(SMALL, names, out=tmp_path, recipe=BRIEF, rates=rates[:1], progress=False)
    for result in first["results"]:
        del result["lr"], result["other_rates"]
    del first["rates"]
    (tmp_path / "recall.json").write_text(json.dumps(first), encoding="utf-8")
    with monkeypatch.context() as patch:
        stop_after(30, patch)
        cut = compare_task(SMALL, names, out=tmp_path, recipe=BRIEF, rates=rates[1:], resume=True, progress=False)
    assert cut["interrupted"] and not any(result["other_rates"] for result in cut["results"])
    found = compare_task(SMALL, names, out=tmp_path, recipe=BRIEF, rates=rates, resume=True, progress=False)
    assert found["command"] == whole["command"] and found["rates"] == rates
    figures = [[(r["mixer"], r["lr"], r["accuracy"]) for r in each["results"]] for each in (whole, found)]
    assert figures[0] == figures[1]


def test_a_mixer_that_has_solved_the_task_tries_no_other_rate() -> None:
    runs = [{"mixer": "gla", "lr": 0.1, "solved": False}, {"mixer": "gla", "lr": 0.2, "solved": True}]
    assert still_to_try(runs, "gla", [0.1, 0.2, 0.3]) == []
    assert still_to_try(runs[:1], "gla", [0.1, 0.2, 0.3]) == [0.2, 0.3]
    assert still_to_try(runs, "retention", [0.1, 0.2]) == [0.1, 0.2]


def test_the_picture_names_every_mixer_and_escapes_it() -> None:
    curve = [{"step": 10 * step, "length": 13, "accuracy": step / 5} for step in range(1, 5)]
    results = [
        {"mixer": name, "accuracy": 0.1 * place, "state_bytes": 10 ** (3 + place), "curve": curve}
        for place, name in enumerate(["a & b", "<script>", "c"])
    ]
    picture = ElementTree.fromstring(draw(SMALL, results))
    assert picture.tag.endswith("svg")
    said = [element.text for element in picture.iter() if element.text]
    assert all(said.count(result["mixer"]) >= 2 for result in results)
    circles = [element for element in picture.iter() if element.tag.endswith("circle")]
    heights = [float(circle.attrib["cy"]) for circle in circles]
    assert heights == sorted(heights, reverse=True) and len(heights) == 3


def test_the_table_has_the_best_first_and_of_equals_the_smaller() -> None:
    common = {"lr": 0.003, "parameters": 5, "steps": 3, "solved": True, "seconds": 1.0}
    shares = {"worse": (0.5, 10), "large": (1.0, 99), "small": (1.0, 9)}
    results = [
        {"mixer": name, "accuracy": share, "state_bytes": size, **common} for name, (share, size) in shares.items()
    ]
    drawn = table(SMALL, {"results": results, "failed": [{"mixer": "other", "reason": "[no]"}]})
    assert list(drawn.columns[0].cells) == ["small", "large", "worse"]
    assert str(drawn.caption) == "Not measured: other (\\[no])."


def test_a_mixer_that_fails_is_noted_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(row("gla").mixer, "mix", broken)
    found = compare_task(SMALL, ["gla", "linear_transformer"], out=tmp_path, recipe=BRIEF, progress=False)
    assert found["failed"] == [{"mixer": "gla", "lr": BRIEF.lr, "reason": "out of luck and more"}]
    assert [result["mixer"] for result in found["results"]] == ["linear_transformer"]
    monkeypatch.undo()
    found = compare_task(SMALL, ["gla"], out=tmp_path, recipe=BRIEF, resume=True, progress=False)
    assert not found["failed"] and len(found["results"]) == 2


def test_what_is_compared_by_itself_is_registered_and_causal() -> None:
    assert "flash_attention" in usual()
    for name in usual():
        make_mixer(name, 64, 2)


# ---- the commands ------------------------------------------------------------------------------------------


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


SIZES = ("--length", "13", "--pairs", "2", "--vocab", "11", "--dim", "16", "--batch", "4", "--steps", "20")


def test_train_learns_a_task_and_says_what_came_of_it(tmp_path: Path) -> None:
    ran = command("train", "--task", "recall", "--mixer", "gla(conv=2)", *SIZES, "--out", str(tmp_path))
    assert ran.exit_code == 0, ran.output
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["steps"] == 20 and result["task"] == {"name": "recall", **vars(SMALL)}
    assert result["recipe"]["dim"] == 16 and result["recipe"]["seed"] == 0
    assert "right after 20 steps" in ran.stdout and str(tmp_path / "result.json") in ran.stdout
    assert ElementTree.parse(tmp_path / "curve.svg").getroot().tag.endswith("svg")


def test_compare_teaches_the_mixers_named(tmp_path: Path) -> None:
    ran = command("compare", "--task", "recall", "-m", "gla", "-m", "retention", *SIZES, "--out", str(tmp_path))
    assert ran.exit_code == 0, ran.output
    found = json.loads((tmp_path / "recall.json").read_text(encoding="utf-8"))
    assert [result["mixer"] for result in found["results"]] == ["gla", "retention"]
    assert all(result["mixer"] in ran.stdout for result in found["results"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("train", "--task", "recall", "--preset", "tiny"), "--preset goes with a language model"),
        (("train", "--pairs", "3", "--heads", "2"), "--pairs and --heads go with --task"),
        (("train", "--task", "copy", "--pairs", "3"), "has no pairs"),
        (("compare", "--task", "recall", "--text", "x"), "--text goes with a model"),
        (("compare", "--task", "recall", "--lr", "0.1;0.2"), "joined by commas"),
        (("compare", "--task", "recall", "--lr", "0.1,0"), "numbers above 0"),
        (("compare", "--minutes", "3"), "--minutes goes with --task"),
        (("compare", "--task", "recall", "-m", "streaming_lm"), "did you mean"),
        (("train", "--task", "recall", "--minutes", "0"), "more than 0"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    arguments: tuple[str, ...], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = command(*arguments)
    assert refused.exit_code == 2 and complaint in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
