"""What the next tokens of real text cost in nats when a method keeps few of a prompt's keys, beside naive choices.

python -m benchmarks.kv_budget [--prompt 1536] [--next 48] [--texts 12] [--budget 128 256] [--row cake]

A text of held-out code: its prompt is read whole, then the tokens after it are read one by one, and their mean loss
is taken. The naive choices keep as many tokens of each layer: the latest, or half of these and half at random.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import RESULTS, write_json
from foveate.cache.memory import BoundedMemory
from foveate.lab.measure import machine
from foveate.methods.alisa import alisa
from foveate.methods.cached import CachedMethod
from foveate.methods.cake import cake
from foveate.models import builtin

SETTINGS = {"prompt": 1536, "next": 48, "texts": 12}
BUDGETS = (128, 256)


class Latest(BoundedMemory):
    """The latest tokens, once a prompt is read."""

    def rank(self, position: Tensor) -> Tensor:
        return position.double()


class HalfAtRandom(BoundedMemory):
    """Half of them the latest, half of them any others, once a prompt is read: a token drawn stays drawn."""

    def rank(self, position: Tensor) -> Tensor:
        drawn = torch.rand(1 << 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)[
            position.clamp_min(0)
        ]
        latest = position > position.amax(2, keepdim=True) - self.budget // 2
        return torch.where(latest, 2.0, drawn)


NAIVE: dict[str, Callable[[int], Any]] = {
    "latest": lambda budget: CachedMethod(lambda _: Latest(budget)),
    "latest and random": lambda budget: CachedMethod(lambda _: HalfAtRandom(budget)),
}
METHODS: dict[str, Callable[[int], Any]] = {
    "alisa": lambda budget: alisa(budget=budget),
    "cake": lambda budget: cake(budget=budget),
}


def texts(count: int, length: int) -> list[Tensor]:
    """Tokens (1, length) of pieces of held-out code, far apart."""
    _, tokenizer = builtin.load()
    tokens = tokenizer(builtin.heldout_text(700_000), return_tensors="pt", verbose=False).input_ids[0]
    stride = (len(tokens) - length) // count
    return [tokens[None, at * stride : at * stride + length] for at in range(count)]


@torch.no_grad()
def loss_after(model: Any, tokens: Tensor, prompt: int, step: int = 1) -> float:
    """Mean nats of the tokens after a prompt, read ``step`` at a time."""
    out = model(tokens[:, :prompt], logits_to_keep=1)
    logits = [out.logits]
    for at in range(prompt, tokens.shape[1] - 1, step):
        part = tokens[:, at : min(at + step, tokens.shape[1] - 1)]
        out = model(part, past_key_values=out.past_key_values)
        logits.append(out.logits)
    return float(torch.nn.functional.cross_entropy(torch.cat(logits, 1)[0], tokens[0, prompt:]))


def measured(model: Any, made: Any, pieces: Sequence[Tensor], prompt: int) -> list[float]:
    """The loss on each text with a method at work, None for the model as it is."""
    if made is None:
        return [loss_after(model, tokens, prompt) for tokens in pieces]
    change = made.install(model)
    try:
        return [loss_after(model, tokens, prompt) for tokens in pieces]
    finally:
        change.undo()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--budget", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--row", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS / "kv_budget.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, _ = builtin.load()
    pieces = texts(options.texts, options.prompt + options.next)
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    settings = {name: getattr(options, name) for name in SETTINGS}
    if record.get("settings") != settings:
        record = {"settings": settings, "losses": {}}
    record["machine"] = machine.describe()
    losses = record["losses"]

    def note(name: str, made: Any) -> None:
        losses[name] = measured(model, made, pieces, options.prompt)
        print(f"{name:24} {sum(losses[name]) / len(losses[name]):.4f}", flush=True)
        write_json(options.out, record)

    if "whole" not in losses:
        note("whole", None)
    for budget in options.budget:
        for name, make in {**NAIVE, **{name: METHODS[name] for name in options.row}}.items():
            if name not in NAIVE or f"{name}, {budget}" not in losses:
                note(f"{name}, {budget}", make(budget))


if __name__ == "__main__":
    main()
