"""What the tokens after a question cost in nats when a long text was read through a window and stored.

python -m benchmarks.kv_questions [--length 1536] [--question 32] [--next 32] [--texts 12] [--window 128] [--blocks 8]

Held-out code is read by the built-in model, then a question (its next tokens) at once, then the tokens after that one
by one. ReKV brings back blocks of 16 tokens that answer the question; beside it as many blocks at random, and a window
that is longer by as many tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import RESULTS, write_json
from benchmarks.kv_budget import texts
from foveate.cache.memory import Look
from foveate.cache.rekv import ReKVMemory
from foveate.lab.measure import machine
from foveate.methods.cached import CachedMethod
from foveate.methods.rekv import rekv
from foveate.methods.streaming import attention_sinks
from foveate.models import builtin

SETTINGS = {"length": 1536, "question": 32, "next": 32, "texts": 12, "window": 128, "blocks": 8}
SINKS, BLOCK = 4, 16


class AtRandom(ReKVMemory):
    """Blocks drawn at random."""

    def choice(self, q: Tensor, look: Look) -> Tensor:
        assert self.means is not None
        drawn = torch.randperm(self.means.shape[1], generator=torch.Generator().manual_seed(self.seen))
        return drawn[: self.blocks].sort().values.expand(q.shape[0], -1)


@torch.no_grad()
def loss(model: Any, tokens: Tensor, length: int, question: int) -> float:
    """Mean nats of the tokens (1, N) after the text and the question."""
    cache = model(tokens[:, :length], logits_to_keep=1).past_key_values
    logits = [model(tokens[:, length : length + question], past_key_values=cache).logits[:, -1:]]
    for at in range(length + question, tokens.shape[1] - 1):
        logits.append(model(tokens[:, at : at + 1], past_key_values=cache).logits)
    return float(torch.nn.functional.cross_entropy(torch.cat(logits, 1)[0], tokens[0, length + question :]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=RESULTS / "kv_questions.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, _ = builtin.load()
    sizes = (SINKS, options.window, BLOCK, options.blocks, options.question)
    methods: dict[str, Any] = {
        "whole": None,
        "rekv": rekv(*sizes),
        "blocks at random": CachedMethod(lambda _: AtRandom(*sizes)),
        "latest": attention_sinks(SINKS, options.window + BLOCK * options.blocks, in_cache=False),
    }
    losses: dict[str, list[float]] = {}
    for name, made in methods.items():
        change = None if made is None else made.install(model)
        pieces = texts(options.texts, options.length + options.question + options.next)
        losses[name] = [loss(model, tokens, options.length, options.question) for tokens in pieces]
        if change is not None:
            change.undo()
        print(f"{name:20} {sum(losses[name]) / len(losses[name]):.4f}", flush=True)
    settings = {name: getattr(options, name) for name in SETTINGS}
    write_json(options.out, {"settings": settings, "machine": machine.describe(), "losses": losses})


if __name__ == "__main__":
    main()
