"""MInference's three patterns at the authors' sizes beside dense attention, index estimation included, on a CPU.

python -m benchmarks.minference_cpu [--length 8192 --length 32768] [--layer 1] [--repeats 3] [--threads 1]

Queries, keys and values are a layer's of the built-in model on real text it has not seen, read with a window (beyond
8192 tokens it reads farther than it was trained to). What counts is the processor's time, the least of runs by turns.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from benchmarks.contest import RESULTS, write_json
from foveate import attend, causal, window
from foveate.adapt import replace_attention
from foveate.kernels.cpu.loader import status
from foveate.lab.measure import machine
from foveate.mixers.core import PatternCore
from foveate.mixers.dynamic_sparse.minference_search import HeadPattern, as_pattern
from foveate.models import builtin
from foveate.patterns import Pattern

SIZES = (  # the authors' A-shape and blocks; their second vertical-slash, and what they take for heads not searched
    HeadPattern("stream_llm", 100, 800),
    HeadPattern("vertical_and_slash", 100, 800),
    HeadPattern("vertical_and_slash", 1000, 6096),
    HeadPattern("block_sparse", 100, 1),
)


class Recorder:
    """Attention to a window, which notes what it was given."""

    pattern: Pattern = window(511, 0)
    given: list[tuple[Tensor, Tensor, Tensor]]

    def __init__(self) -> None:
        self.given = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.given.append((q, k, v))
        return PatternCore(self.pattern)(q, k, v, **options)


def read(length: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's queries, keys and values on held-out text."""
    model, tokenizer = builtin.load()
    tokens = tokenizer(builtin.heldout_text(6 * length), return_tensors="pt", verbose=False).input_ids[:, :length]
    assert tokens.shape[1] == length, "more text is needed"
    recorder = Recorder()
    with replace_attention(model, recorder):
        model.model(tokens, use_cache=False)
    return recorder.given[layer]


def measured(runs: dict[str, Callable[[], Any]], repeats: int, what: str) -> dict[str, float]:
    """Least processor's seconds of each."""
    least = dict.fromkeys(runs, float("inf"))
    for _ in track(range(repeats), what, transient=True):
        for name, run in runs.items():
            start = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - start)
    return least


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, action="append")
    for name, default in (("layer", 1), ("repeats", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=RESULTS / "minference_cpu.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cases = []
    with torch.no_grad():
        for length in options.length or (8192, 32768):
            q, k, v = read(length, options.layer)
            exact = attend(q, k, v, causal)
            for one in SIZES:
                pattern = as_pattern(one) & causal
                runs: dict[str, Callable[[], Any]] = {
                    "sparse": partial(attend, q, k, v, pattern),
                    "dense": partial(attend, q, k, v, causal),
                }
                error = float((runs["sparse"]() - exact).norm() / exact.norm())
                seconds = measured(runs, options.repeats, f"{one.kind}, {length:,} tokens")
                pairs = pattern.select(q, k).density / 0.5
                case = {"kind": one.kind, "sizes": one[1:], "tokens": length, "seconds": seconds}
                cases.append(case | {"share_of_pairs": pairs, "relative_error": error, "load": os.getloadavg()[0]})
                gain = seconds["dense"] / seconds["sparse"]
                print(f"{one}, {length:,} tokens: {gain:.2f}x, {pairs:.1%} of the pairs, error {error:.3f}")
    write_json(options.out, {"machine": machine.describe(), "isa": status().isa, "cases": cases})


if __name__ == "__main__":
    main()
