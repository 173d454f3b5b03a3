"""The training engine: resumable to the bit, aware of the clock, and honest about what it cannot resume."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foveate.lab.train import export as train_export
from foveate.lab.train import resumable
from foveate.lab.train.data import batch_at, train_tokenizer
from foveate.lab.train.evaluate import bits_per_byte, token_bits, window_mask
from foveate.lab.train.export import export
from foveate.lab.train.loop import Phase, Recipe, train
from foveate.lab.train.model import language_loss, set_gradients
from foveate.lab.train.run import Run, read_checkpoint, read_log

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(Recipe.tiny(), tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A run's folder with its text already made into tokens."""
    for name in ("tokens.npy", "tokenizer.json", "tokenizer_config.json", "heldout.txt", "data.json"):
        shutil.copyfile(finished / name, tmp_path / name)
    return tmp_path


def kill_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Run.housekeeping

    def housekeeping(run: Run, loss: float) -> None:
        usual(run, loss)
        if run.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "housekeeping", housekeeping)


def test_a_killed_and_resumed_run_gives_the_same_weights(
    finished: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_after(3, patch)
        train(Recipe.tiny(), folder)
    assert read_checkpoint(folder)["step"] == 3
    assert not (folder / "model").exists()
    train(Recipe.tiny(), folder)
    whole, resumed = read_checkpoint(finished)["model"], read_checkpoint(folder)["model"]
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_training_lowers_the_loss(folder: Path) -> None:
    recipe = replace(Recipe.tiny(), steps=60, phases=(Phase(1.0, 65, 4),))
    losses = [row["loss"] for row in read_log(train(recipe, folder)) if "loss" in row]
    assert losses[-1] < losses[0] - 0.5


def test_the_export_loads_and_keeps_what_was_learned(finished: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "model")
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 256
    trained = read_checkpoint(finished)["model"]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, trained[name], rtol=2**-8, atol=1e-6)


def test_nothing_exported_names_a_place_on_this_machine(finished: Path) -> None:
    for file in (finished / "model").iterdir():
        content = file.read_bytes()
        assert str(Path.home()).encode() not in content, file
        assert str(finished).encode() not in content, file
        assert os.fsencode(Path(torch.__file__).parent) not in content, file


def test_another_recipe_does_not_take_over_a_run(finished: Path) -> None:
    with pytest.raises(ValueError, match=r"hidden 32 against 64"):
        train(replace(Recipe.tiny(), hidden=64), finished)


def test_minutes_end_the_run_and_the_decay_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(resumable, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    recipe = replace(Recipe.tiny(), steps=1_000_000)
    train(recipe, folder, minutes=2.0)
    state = read_checkpoint(folder)
    assert 10 < state["step"] < 120
    rate = state["optimizers"][0]["param_groups"][0]["lr"]
    assert rate < 0.2 * recipe.muon_lr
    with pytest.raises(ValueError, match="minutes must be more than 0"):
        train(recipe, folder, minutes=0)
    with pytest.raises(ValueError, match="minutes must be more than 0"):
        train(recipe, folder, minutes=float("nan"))


def test_gradients_of_rows_add_up_to_those_of_the_batch(seed: int, folder: Path) -> None:
    run = Run(Recipe.tiny(), folder, None)
    batch = batch_at(run.tokens, Phase(1.0, 37, 5), seed, 0)
    with ThreadPoolExecutor(3) as pool:
        mean = set_gradients(run.model, batch, bf16=False, pool=pool)
    rows = [parameter.grad.clone() for parameter in run.model.parameters()]
    run.model.zero_grad()
    loss = language_loss(run.model, batch, bf16=False)
    loss.backward()
    assert mean == pytest.approx(loss.item())
    for parameter, gradient in zip(run.model.parameters(), rows, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_recipes_survive_json_and_reach_every_phase() -> None:
    for recipe in (Recipe.builtin(), Recipe.tiny()):
        assert Recipe.from_json(recipe.to_json()) == recipe
        reached = [recipe.phase(i / 1000) for i in range(1001)]
        assert list(dict.fromkeys(reached)) == list(recipe.phases)
        rates = [recipe.rate(step, step / 1000) for step in range(1000)]
        assert max(rates) == 1.0 and rates[-1] == pytest.approx(0.01) and min(rates) > 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"phases": (Phase(0.5, 37, 3),)}, "up to 1.0"),
        ({"phases": (Phase(1.0, 512, 3),)}, "context of as many"),
        ({"heads": 3}, "must divide hidden"),
        ({"sources": ("numpy",)}, "name 'cpython' too"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(Recipe.tiny(), **change)


def test_batches_depend_on_seed_and_step_alone(seed: int) -> None:
    tokens = torch.arange(1000).to(torch.uint16).numpy()
    phase = Phase(1.0, 37, 5, repeat=0.5)
    first = batch_at(tokens, phase, seed, 7)
    assert first.shape == (5, 38)
    assert torch.equal(first, batch_at(tokens, phase, seed, 7))
    assert not torch.equal(first, batch_at(tokens, phase, seed, 8))


def test_a_repeated_row_holds_one_span_twice_and_the_text_itself_stays(seed: int) -> None:
    tokens = torch.arange(1000).to(torch.uint16).numpy()
    for row in batch_at(tokens, Phase(1.0, 130, 9, repeat=1.0), seed, 0).tolist():
        assert len(set(row)) < len(row)
    assert tokens.tolist() == list(range(1000))


def test_tokens_of_any_text_give_the_text_back(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokenizer = train_tokenizer(["def f(x):\n    return x\n" * 9], 300)
    for _ in range(50):
        points = torch.randint(1, 0xD7FF, (37,), generator=generator).tolist()
        text = "".join(map(chr, points)) + "  \n\t \r\n"
        assert tokenizer.decode(tokenizer(text).input_ids) == text


class Uniform:
    """A model that gives every one of 256 tokens the same chance: exactly 8 bits each."""

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 256)})


def test_bits_are_counted_per_token_and_per_byte() -> None:
    assert token_bits(Uniform(), torch.arange(37)).tolist() == pytest.approx([8.0] * 36)
    tokenizer = train_tokenizer(["nothing to merge"], 257)
    assert bits_per_byte(Uniform(), tokenizer, "x" * 65, context=13) == pytest.approx(8.0)
    with pytest.raises(ValueError, match="needs a longer text"):
        bits_per_byte(Uniform(), tokenizer, "x" * 5, context=13)


def test_a_window_mask_shows_each_token_itself_and_those_just_before() -> None:
    length, window = 37, 5
    mask = window_mask(length, window)[0, 0]
    seen = [[j for j in range(length) if mask[i, j]] for i in range(length)]
    assert seen == [list(range(max(0, i - window + 1), i + 1)) for i in range(length)]


def test_a_log_forgets_what_the_checkpoint_does_not_know(folder: Path) -> None:
    run = Run(Recipe.tiny(), folder, None)
    run.save()
    run.step = 10
    run.log(loss=1.0)
    Run(Recipe.tiny(), folder, None).load()
    assert read_log(folder) == []
    assert json.loads((folder / "data.json").read_text(encoding="utf-8"))["files"] > 0


def test_a_last_line_cut_off_by_a_kill_is_left_out(finished: Path, tmp_path: Path) -> None:
    rows = [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 0.5}]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    for cut_off in ("", '{"step": 30, "lo', "\udcff"):
        (tmp_path / "log.jsonl").write_bytes((whole + cut_off).encode("utf-8", "surrogateescape"))
        assert read_log(tmp_path) == rows
    (tmp_path / "log.jsonl").write_text("{\n" + whole)
    with pytest.raises(ValueError, match=r"line 1 of .* is damaged"):
        read_log(tmp_path)


@pytest.mark.parametrize("name", ["checkpoint.pt", "recipe.json", "tokens.npy", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\0\1 nonsense", b"[3]"])
def test_a_damaged_file_is_told_in_words(finished: Path, tmp_path: Path, name: str, content: bytes) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged|not the recipe of a run"):
        train(Recipe.tiny(), tmp_path / "run")


def test_the_model_appears_when_all_of_it_is_there(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    before = sorted(file.name for file in (run / "model").iterdir())
    with monkeypatch.context() as patched:

        def fail(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr(train_export, "write_card", fail)
        shutil.rmtree(run / "model")
        with pytest.raises(OSError, match="No space"):
            export(run, run / "model")
        assert not (run / "model").exists()
    export(run, run / "model")
    assert sorted(file.name for file in (run / "model").iterdir()) == before
    assert not (run / ".model.part").exists()
