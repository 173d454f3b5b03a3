"""From a run to a model folder that `from_pretrained` takes, with its evaluation and its card."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.lab.train.card import draw, write_card
from foveate.lab.train.data import load_tokenizer
from foveate.lab.train.evaluate import bits_per_byte_of
from foveate.lab.train.model import build_model
from foveate.lab.train.recipe import Recipe, read_recipe
from foveate.lab.train.run import read_checkpoint, read_log
from foveate.models.builtin import read_heldout

CONTEXTS = (1024, 4096, 8192)
WINDOWS = (128, 512)
EVALUATED_PIECES, EVALUATE_ONE_IN = 4, 4
MOST_BYTES_A_TOKEN = 4


def export(run: Path, folder: Path) -> Path:
    """Write the run's latest checkpoint as a bfloat16 Hugging Face model, measured, with a card.

    The folder appears when all of it is there, and takes the place of one from before.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _write_all(run, part)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)
    return folder


def _write_all(run: Path, folder: Path) -> None:
    recipe = read_recipe(run / "recipe.json")
    state = read_checkpoint(run)
    _write_model(recipe, state["model"], run, folder)
    for name in ("heldout.txt", "data.json", "recipe.json"):
        shutil.copyfile(run / name, folder / name)
    log = read_log(run)
    write_json(folder / "training_log.json", log)
    facts = {"steps": state["step"], "tokens": state["seen"], "minutes": round(state["used"] / 60, 1)}
    facts |= {"machine": machine(), "evaluated_tokens": EVALUATED_PIECES * recipe.context}
    facts |= {"heldout": evaluate(folder, recipe)}
    write_json(folder / "evaluation.json", facts)
    draw(log, folder / "training.svg")
    write_card(folder, recipe, facts)


def _write_model(recipe: Recipe, weights: dict[str, torch.Tensor], run: Path, folder: Path) -> None:
    tokenizer = load_tokenizer(run)
    tokenizer.model_max_length = recipe.context
    model = build_model(recipe, tokenizer)
    model.load_state_dict(weights)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    _write_for_older_readers(folder, recipe)


def _write_for_older_readers(folder: Path, recipe: Recipe) -> None:
    """Name what transformers 4 looks for under other names than transformers 5 writes."""
    config, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
    write_json(config, json.loads(config.read_text(encoding="utf-8")) | {"rope_theta": recipe.rope_theta})
    written = json.loads(tokenizer.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    kept = {name: value for name, value in written.items() if name not in ("is_local", "local_files_only")}
    write_json(tokenizer, kept)


def evaluate(folder: Path, recipe: Recipe) -> list[dict[str, float]]:
    """Bits per byte of the written model: one row per context, with full attention and with windows."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    ids = _some_of_the_heldout_tokens(folder, tokenizer, recipe.context)
    contexts = [length for length in CONTEXTS if length <= recipe.context] or [recipe.context]
    return [_evaluate_at(length, model, tokenizer, ids) for length in contexts]


def _some_of_the_heldout_tokens(folder: Path, tokenizer: Any, context: int) -> Tensor:
    """Pieces of the longest context, far enough apart to come from several files: (N,) int64."""
    names = (folder / "heldout.txt").read_text(encoding="utf-8").splitlines()
    num_tokens = EVALUATED_PIECES * EVALUATE_ONE_IN * context
    ids = tokenizer(read_heldout(names, MOST_BYTES_A_TOKEN * num_tokens), verbose=False).input_ids
    return torch.tensor(ids[:num_tokens]).view(-1, context)[::EVALUATE_ONE_IN].flatten()


def _evaluate_at(context: int, model: Any, tokenizer: Any, ids: Tensor) -> dict[str, float]:
    row: dict[str, float] = {"context": context}
    row["full"] = round(bits_per_byte_of(ids, model, tokenizer, context=context), 4)
    for window in WINDOWS:
        bits = bits_per_byte_of(ids, model, tokenizer, context=context, window=window)
        row[f"window_{window}"] = round(bits, 4)
    return row


def machine() -> str:
    """The machine in words: processor, cores in use, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
