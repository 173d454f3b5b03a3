"""What the last tokens of a text cost in nats where every query may reach but so many keys.

python -m benchmarks.kv_reach [--length 1024] [--last 128] [--texts 5] [--reach 256]

Each text is read at once by the built-in model: whole; with the latest keys alone (and four sinks); with 16 chunks of
keys that each head chooses.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import RESULTS, write_json
from benchmarks.kv_budget import texts
from foveate.lab.measure import machine
from foveate.methods.longheads import longheads
from foveate.methods.streaming import attention_sinks
from foveate.models import builtin

SETTINGS = {"length": 1024, "last": 128, "texts": 5}
METHODS: dict[str, Callable[[int], Any]] = {
    "latest": lambda reach: attention_sinks(sinks=4, window=reach - 4),
    "longheads": lambda reach: longheads(chunk=reach // 16, count=16),
}


@torch.no_grad()
def loss(model: Any, tokens: torch.Tensor, last: int) -> float:
    """Mean nats of the last tokens of a text (1, N)."""
    logits = model(tokens[:, :-1], logits_to_keep=last).logits[0]
    return float(torch.nn.functional.cross_entropy(logits, tokens[0, -last:]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--reach", type=int, nargs="+", default=[256])
    parser.add_argument("--out", type=Path, default=RESULTS / "kv_reach.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, _ = builtin.load()
    pieces = texts(options.texts, options.length)
    losses: dict[str, list[float]] = {"whole": [loss(model, tokens, options.last) for tokens in pieces]}
    for reach in options.reach:
        for name, make in METHODS.items():
            change = make(reach).install(model)
            losses[f"{name}, {reach}"] = [loss(model, tokens, options.last) for tokens in pieces]
            print(name, losses[f"{name}, {reach}"], flush=True)
            change.undo()
    for name, each in losses.items():
        print(f"{name:16} {sum(each) / len(each):.4f}")
    settings = {name: getattr(options, name) for name in SETTINGS}
    write_json(options.out, {"settings": settings, "machine": machine.describe(), "losses": losses})


if __name__ == "__main__":
    main()
