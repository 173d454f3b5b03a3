"""Native Sparse Attention beside dense attention at long length, on a CPU: prefill, training and decoding.

python -m benchmarks.nsa_cpu [--length 65536] [--trained 32768] [--dim 512] [--heads 8] [--kv-heads 2] [--repeats 2]
                              [--task prefill]

Both are whole mixers, projections included, of equal sizes on equal random tokens, with the paper's blocks: 32 tokens
every 16 are compressed, 16 blocks of 64 are chosen, the window holds 512. What counts is the processor's time, the
least of runs by turns, which other work on the machine adds least to. No figure here is of a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from benchmarks.contest import RESULTS, write_json
from foveate.catalogue.registry import mixer as made
from foveate.kernels.cpu.loader import status
from foveate.lab.measure import machine
from foveate.mixers.attention import AttentionMixer
from foveate.mixers.base import Mixer

SETTINGS = {"length": 65536, "trained": 32768, "dim": 512, "heads": 8, "kv_heads": 2, "repeats": 2, "threads": 1}
TASKS = ("decoding step", "prefill", "forward + backward")
STEPS = 100  # decoded tokens for each repeat
CHECKED = 3000  # tokens whose last is decoded, too
PIECE = 8192  # tokens of a decoder's prompt read at once
TOLERANCE = 1e-3

Run = Callable[[], Any]


def prefilled(mixer: Mixer, x: Tensor) -> Run:
    @torch.no_grad()
    def run() -> Tensor:
        return mixer(x)

    return run


def trained(mixer: Mixer, x: Tensor) -> Run:
    x = x.clone().requires_grad_()
    return lambda: torch.autograd.grad(mixer(x).square().sum(), [x, *mixer.parameters()])


@torch.no_grad()
def decoded(mixer: Mixer, x: Tensor, steps: int) -> Run:
    state = mixer.init_state(1, x.shape[1] + steps)
    if isinstance(mixer, AttentionMixer):  # nothing but keys and values
        state = state.append(*mixer.project(x[:, :-1], x[:, :-1])[1:])
    else:
        for piece in x[:, :-1].split(PIECE, dim=1):
            state = mixer.prefill(piece, state).state

    @torch.no_grad()
    def run() -> Tensor:
        nonlocal state
        out, state = mixer.decode(x[:, -1:], state)
        return out

    return run


def run_of(task: str, mixer: Mixer, x: Tensor, repeats: int) -> Run:
    if task == "decoding step":
        return decoded(mixer, x, repeats)
    return prefilled(mixer, x) if task == "prefill" else trained(mixer, x)


def measured(runs: dict[str, Run], repeats: int, what: str) -> dict[str, float]:
    """Least processor's seconds of each."""
    least = dict.fromkeys(runs, float("inf"))
    for _ in track(range(repeats), what, transient=True):
        for name, run in runs.items():
            start = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - start)
    return least


def check(mixer: Mixer, x: Tensor) -> float:
    """How far the last token's step lies from the whole sequence."""
    with torch.no_grad():
        error = float((decoded(mixer, x, 1)() - mixer(x)[:, -1:]).abs().max())
    if not error <= TOLERANCE:
        raise SystemExit(f"a step is {error:.1e} off the whole sequence; nothing timed")
    return error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--task", action="append", choices=TASKS, help="only these")
    parser.add_argument("--out", type=Path, default=RESULTS / "nsa_cpu.json", help="JSON to bring up to date")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = {"heads": options.heads, "kv_heads": options.kv_heads}
    mixers = {"nsa": made("nsa", options.dim, **sizes), "dense": made("flash_attention", options.dim, **sizes)}
    x = torch.randn(1, options.length, options.dim)
    error = check(mixers["nsa"], x[:, :CHECKED])
    for task in options.task or TASKS:
        length = options.trained if task == "forward + backward" else options.length
        repeats = options.repeats * (STEPS if task == "decoding step" else 1)
        runs = {name: run_of(task, mixer, x[:, :length], repeats) for name, mixer in mixers.items()}
        seconds = measured(runs, repeats, task)
        settings = {name: getattr(options, name) for name in SETTINGS}
        facts = {"settings": settings, "load": os.getloadavg()[0], "error": error}
        save({"task": task, "tokens": length, "seconds": seconds} | facts, options.out)
        own, dense = seconds["nsa"], seconds["dense"]
        print(f"{task} of {length:,} tokens: {own:.4g} s, dense {dense:.4g} s, {dense / own:.2f}x")


def save(case: dict[str, Any], out: Path) -> None:
    """Bring the record up to date in one task."""
    found = json.loads(out.read_text(encoding="utf-8"))["cases"] if out.exists() else []
    cases = sorted(
        [*(old for old in found if old["task"] != case["task"]), case], key=lambda one: TASKS.index(one["task"])
    )
    write_json(out, {"machine": machine.describe(), "isa": status().isa, "cases": cases})


if __name__ == "__main__":
    main()
